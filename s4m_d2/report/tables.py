"""The tables of a page: results by model and by class, settings, quality of pseudo-labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from s4m_d2.report.run import Run, Settings, finite
from s4m_d2.report.svg import escape

MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CLASS_LETTERS = 60  # of a class's name
OPEN_CLASSES = 20  # more rows are folded away
_CLASS = "AP-"
_DASH = "–"

Models = Mapping[str, Mapping[str, float | None]]


def models_of(run: Run) -> dict[str, Mapping[str, float | None]]:
    """Mask AP of every evaluated model, by name."""
    return {name: values for stage in run.stages for name, values in stage.models()}


def best_model(models: Models) -> str | None:
    """The model with the highest AP; None: none has one above 0."""
    rated = {
        name: ap for name, values in models.items() if (ap := finite(values.get("AP")) or 0) > 0
    }
    return max(rated, key=rated.__getitem__) if rated else None


def results_html(models: Models) -> str:
    """A row for each model, the best marked."""
    columns = [m for m in MEASURES if any(m in values for values in models.values())]
    best = best_model(models)
    rows = []
    for name, values in models.items():
        mark = ' <span class="tag">best</span>' if name == best else ""
        cells = "".join(f"<td>{_one(values.get(column))}</td>" for column in columns)
        style = ' class="best"' if name == best else ""
        rows.append(f"<tr{style}><th scope='row'>{escape(name)}{mark}</th>{cells}</tr>")
    return _table(["model", *columns], rows, "results")


def classes_html(models: Models) -> str:
    """AP by class, a column for each model with bars; "" where there is none."""
    classes = list(dict.fromkeys(k for v in models.values() for k in v if k.startswith(_CLASS)))
    if not classes:
        return ""
    names = list(models)
    compared = "stage-1 teacher" in models and "student" in models
    top = max((finite(models[n].get(c)) or 0.0 for n in names for c in classes), default=0.0)
    rows = []
    for key in classes:
        values = {name: finite(models[name].get(key)) for name in names}
        cells = "".join(_bar(values[name], top, i) for i, name in enumerate(names))
        if compared:
            cells += f"<td>{_change(values['stage-1 teacher'], values['student'])}</td>"
        title = escape(key.removeprefix(_CLASS), CLASS_LETTERS)
        rows.append(f"<tr><th scope='row' class='name'>{title}</th>{cells}</tr>")
    heads = ["class", *names, *(["gain of the student"] if compared else [])]
    opened = " open" if len(classes) <= OPEN_CLASSES else ""
    return (
        f"<details{opened}><summary>Mask AP of {len(classes)} "
        f"class{'es' * (len(classes) != 1)}</summary>{_table(heads, rows, 'classes')}</details>"
    )


def pairs_html(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and texts."""
    rows = [
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(text)}</td></tr>"
        for name, text in pairs
        if text
    ]
    return _wrapped(f"<table class='pairs'><tbody>{''.join(rows)}</tbody></table>") if rows else ""


def settings_rows(settings: Settings) -> Iterator[tuple[str, str]]:
    """What matters most of a config."""
    if not settings.values:
        return
    get = settings.get
    yield "model", _words(get("MODEL.META_ARCHITECTURE"), _backbone(settings))
    for name, key, own in (
        ("labeled images", "DATASETS.TRAIN", "S4M.DATA.LABELED"),
        ("unlabeled images", "DATASETS.UNLABELED", "S4M.DATA.UNLABELED"),
        ("validation images", "DATASETS.TEST", "S4M.DATA.VAL"),
    ):
        yield name, _words(get(own)) or _words(*_listed(get(key))) or "none"
    yield from _schedule_rows(settings)
    size = _words(get("SOLVER.OPTIMIZER"), _labeled("base learning rate", get("SOLVER.BASE_LR")))
    yield "optimizer", _words(size, get("SOLVER.LR_SCHEDULER_NAME"))
    yield (
        "structural distillation (SD)",
        _part(settings, "DISTILL", _labeled("weight", get("S4M.DISTILL.WEIGHT"))),
    )
    yield (
        "pseudo-label refinement (PR)",
        _part(settings, "REFINE", _labeled("method", get("S4M.REFINE.METHOD"))),
    )
    placed = "at random places" if get("S4M.ARP.RANDOM_PLACEMENT") else "in place"
    yield "exchange of instances (ARP)", _part(settings, "ARP", placed)
    sam = [get(f"S4M.SAM.{key}") for key in ("BACKEND", "MODEL_TYPE", "CHECKPOINT")]
    yield "SAM", _words(*(sam if sam[-1] else sam[:1]))  # the packaged one has no other type
    yield "pseudo-labels", _labeled("score above", get("S4M.PSEUDO_LABEL.SCORE_THRESH"))
    amp = get("S4M.AMP_PRECISION") if get("SOLVER.AMP.ENABLED") else "float32"
    yield "computing", _words(get("MODEL.DEVICE"), amp, _labeled("seed", get("SEED")))


def _schedule_rows(settings: Settings) -> Iterator[tuple[str, str]]:
    batch, iterations = settings.number("SOLVER.IMS_PER_BATCH"), settings.number("SOLVER.MAX_ITER")
    first = settings.number("S4M.TEACHER.IMS_PER_BATCH") or batch
    length = settings.number("S4M.TEACHER.MAX_ITER") or iterations
    if settings.get("S4M.TEACHER_WEIGHTS"):
        yield "stage 1", f"not run: the teacher is {settings.get('S4M.TEACHER_WEIGHTS')}"
    elif settings.get("S4M.STAGE") != "student":
        yield "stage 1", f"{length:,} iterations of {first} labeled images"
    if settings.get("S4M.STAGE") != "teacher":
        more = settings.number("S4M.UNLABELED_IMS_PER_BATCH") or batch
        yield "stage 2", f"{iterations:,} iterations of {batch} labeled and {more} unlabeled images"
        yield "burn-in", f"{settings.number('S4M.BURN_IN'):,} iterations"
        yield "EMA teacher", _labeled("decay", settings.get("S4M.EMA_DECAY"))
        weight = settings.get("S4M.UNSUP_LOSS_WEIGHT")
        yield "losses on pseudo-labels", _labeled("weight", weight)


def _part(settings: Settings, part: str, details: str) -> str:
    enabled = settings.get(f"S4M.{part}.ENABLED")
    if enabled is None:
        return ""
    return _words("on", details) if enabled else "off"


def _backbone(settings: Settings) -> str:
    name = str(settings.get("MODEL.BACKBONE.NAME", ""))
    if "timm" in name:
        return str(settings.get("MODEL.TIMM.NAME", name))
    depth = settings.get("MODEL.RESNETS.DEPTH")
    return f"ResNet-{depth}" if "resnet" in name and depth else name


def _labeled(name: str, value: Any) -> str:
    """A value with its name, "" if there is none."""
    return "" if value in (None, "") else f"{name} {value}"


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _words(*values: Any) -> str:
    return ", ".join(str(value) for value in values if value not in (None, "", [], ()))


def _one(value: Any) -> str:
    number = finite(value)
    return _DASH if number is None else f"{number:.1f}"


def _bar(value: float | None, top: float, color: int) -> str:
    share = 100 * max(value or 0.0, 0.0) / top if top > 0 else 0.0
    return f'<td class="bar c{color}" style="--share:{share:.1f}%">{_one(value)}</td>'


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return _DASH
    change = round(after - before, 1)
    style = "up" if change > 0 else "down" if change < 0 else "same"
    return f'<span class="{style}">{signed(change)}</span>'


def signed(change: float) -> str:
    """A difference of AP with its sign.

    >>> signed(1.25), signed(-3.0), signed(-0.01)
    ('+1.2', '−3.0', '0.0')
    """
    text = f"{change:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _table(heads: Sequence[str], rows: Iterable[str], style: str = "") -> str:
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in heads)
    kind = f" class='{style}'" if style else ""
    return _wrapped(
        f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _wrapped(table: str) -> str:
    """In a box that scrolls where the table is too wide."""
    return f"<div class='scroll'>{table}</div>"
