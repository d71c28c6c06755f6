"""A run as one HTML file, without scripts or external resources, with curves drawn as SVG."""

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from s4m_d2.errors import printable
from s4m_d2.files import atomic_write
from s4m_d2.report.run import (
    LABELED,
    MASKS,
    MEASURES,
    MODELS,
    UNLABELED,
    Curve,
    Run,
    Stage,
    finite,
)

OF_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FIRST, STUDENT, TUNED = MODELS.values()
CLASS = "AP-"  # before a class's name

Models = Mapping[str, Mapping[str, float | None]]
# Okabe and Ito's colors, which are distinguishable with color blindness; the page's style sheet
# names them c0 to c5.
CURVES = ("#0072b2", "#d55e00", "#00916a", "#b0578d", "#b07d00", "#6b7280")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "s4m_d2",  # the same chart is the same text
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.prop_cycle": cycler(linestyle=["-", "--"]) * cycler(color=CURVES),
    "axes.xmargin": 0,
    "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}
# Display names of losses; others keep their names.
_KINDS = {"loss_ce": "class", "loss_mask": "mask, cross-entropy", "loss_dice": "mask, dice"}
_LOSS_UNIT = "weighted, sum of all decoder layers"
_SHARE_KEPT = "share; the teacher's is kept"
_QUALITY = {"sq": "SQ (IoU of matches)", "pq": "PQ"}
# Title, unit, and the lines' names by curve.
_CHARTS: list[tuple[str, str, dict[str, str]]] = [
    ("Structural distillation", "weighted loss", {"labeled:loss_sd": "on labeled images"}),
    (
        "Pseudo-labels",
        "per image",
        {
            "pseudo_labels/per_image": "of the teacher",
            "pseudo_labels/per_image_after_arp": "after ARP",
            "pseudo_labels/duplicates_per_image": "dropped as duplicates",
        },
    ),
    (
        "Predictions dropped, by the first rule that does",
        "share of the queries",
        {
            "pseudo_labels/dropped_no_object": "no object",
            "pseudo_labels/dropped_score": "score too low",
            "pseudo_labels/dropped_area": "mask too small",
            "pseudo_labels/dropped_non_finite": "not finite",
        },
    ),
    ("SAM's estimate of refined masks", "IoU", {"refinement/predicted_iou": "predicted IoU"}),
    ("Refined masks that were empty", _SHARE_KEPT, {"refinement/fallbacks": "empty masks"}),
    *(
        (
            f"Pseudo-label quality: {_QUALITY.get(name, name.replace('_', ' '))}",
            "share, against the true labels",
            {
                f"pseudo_label_quality/before/{name}": "teacher's masks",
                f"pseudo_label_quality/after/{name}": "refined by SAM",
            },
        )
        for name in MEASURES
    ),
    ("Learning rate", "of the first parameter group", {"lr": "learning rate"}),
    ("Time", "seconds per iteration", {"time": "iteration", "data_time": "waiting for data"}),
]
# Units of charts without curves that are always 0.
_MOSTLY_ZERO = ("share of the queries", _SHARE_KEPT)


def write_report(folder: str, problem: str = "") -> str:
    """Write the page of a run into its folder (arguments as of :class:`Run`); returns its path."""
    page = render_page(Run(folder, problem))
    path = os.path.join(folder, "report.html")
    with atomic_write(path, "wb") as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def render_page(run: Run) -> str:
    """Render the page."""
    models = {name: values for stage in run.stages for name, values in stage.models()}
    aps = {name: finite(values.get("AP")) for name, values in models.items()}
    best = max(aps, key=lambda name: aps[name] or 0.0, default="")
    newest_first = run.stages[::-1]
    return render(
        "page.html",
        run=run,
        started=any(stage.curves.iterations for stage in run.stages),
        models=models,
        measures=[m for m in OF_AP if any(m in values for values in models.values())],
        best=best if aps.get(best) else "",
        classes=list(_classes(models)),
        compared=FIRST in models and STUDENT in models,
        cards=[*_ap_cards(aps, best), *(card for s in run.stages for card in _stage_cards(s))],
        ap_charts=[chart for s in newest_first for chart in ap_chart(s, aps.get(FIRST))],
        stages=[(s, f"{s.progress}. {_facts(s)}", stage_charts(s)) for s in newest_first],
    )


def render(template: str, **values: Any) -> str:
    """Fill in a template of this folder; every text is escaped, in one line, and not too long."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("s4m_d2", "report"),
        autoescape=True,
        finalize=_in_one_line,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"ap": _ap, "number": number, "signed": signed}
    return environment.get_template(template).render(values)


def _in_one_line(value: Any) -> Any:
    """Make texts of the run printable and limit their length; markup is unchanged."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _ap(value: Any) -> str:
    known = finite(value)
    return "–" if known is None else f"{known:.1f}"


def signed(change: float) -> str:
    """Format a difference of AP with its sign.

    >>> signed(1.25), signed(-3.0), signed(-0.01)
    ('+1.2', '−3.0', '0.0')
    """
    text = f"{change:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _classes(models: Models) -> Iterator[tuple[str, list[tuple[Any, str]], float | None]]:
    """(class, (AP, bar's width in percent) of each model, gain of the student)."""
    keys = list(dict.fromkeys(k for v in models.values() for k in v if k.startswith(CLASS)))
    table = {name: {key: finite(v.get(key)) for key in keys} for name, v in models.items()}
    top = max((ap or 0.0 for values in table.values() for ap in values.values()), default=0.0)
    for key in keys:
        aps = [values[key] for values in table.values()]
        bars = [(ap, f"{100 * max(ap or 0.0, 0.0) / (top or 1.0):.1f}") for ap in aps]
        first, student = (table.get(name, {}).get(key) for name in (FIRST, STUDENT))
        gain = None if first is None or student is None else round(student - first, 1)
        yield printable(key.removeprefix(CLASS), 60), bars, gain


def _ap_cards(aps: Mapping[str, float | None], best: str) -> Iterator[tuple[str, str]]:
    if value := aps.get(best):
        yield f"{value:.1f}", f"mask AP of the best model, the {best}"
    for before, after in ((FIRST, STUDENT), (STUDENT, TUNED)):
        first, second = aps.get(before), aps.get(after)
        if first is not None and second is not None:
            yield signed(second - first), f"AP of the {after} against the {before}"


def _stage_cards(stage: Stage) -> Iterator[tuple[str, str]]:
    whole = f" of {stage.iterations:,}" if stage.done < stage.iterations else ""
    seconds = stage.curves.mean("time")
    if seconds * stage.done > 0:
        speed = f"{number(1 / seconds, 3)} per second"
        what = f"training of the {stage.model}: {stage.done:,}{whole} iterations, {speed}"
        yield f"≈ {timedelta(seconds=round(seconds * stage.done))}", what
    elif stage.done:
        yield f"{stage.done:,}{whole}", f"iterations of the {stage.model}"
    count = stage.curves["pseudo_labels/per_image"].last
    if math.isfinite(count):
        yield number(count, 3), "pseudo-labels per image, at the end"


def _facts(stage: Stage) -> str:
    said = []
    if math.isfinite(mean := stage.curves.mean("pseudo_labels/per_image")):
        said.append(f"{number(mean, 3)} pseudo-labels per image on average.")
    for name, text in (
        ("train/bad_steps", "steps skipped, whose losses or gradients were not finite"),
        ("data/skipped_images", "unreadable unlabeled images skipped"),
    ):
        if (count := stage.curves[name].last) > 0:  # NaN: unknown
            said.append(f"{count:,.0f} {text}.")
    return " ".join(said)


class Chart(NamedTuple):
    """Curves over iterations; bands are minima and maxima of points that have several values."""

    title: str
    unit: str  #: of the values
    lines: Mapping[str, Curve]  #: by name, at least one
    burn_in: int = 0  #: its end is marked, if it is within the range of the data
    from_zero: bool = True  #: the axis of values includes 0

    def uri(self) -> str:
        """Draw an SVG, as a data URI."""
        file = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure().savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"

    def in_words(self) -> str:
        said = []
        for name, curve in self.lines.items():
            values = (curve.mean[0], curve.mean[-1], curve.low.min(), curve.high.max())
            first, last, least, most = map(number, values)
            said.append(f"{name} from {first} to {last}, least {least}, greatest {most}")
        return f"{self.title}, {self.unit}: {'; '.join(said)}"

    def figure(self) -> Figure:
        figure = Figure(figsize=(460 / 72, 240 / 72))  # in inches: as many points as page.html's px
        axes = figure.add_axes((0.125, 0.175, 0.845, 0.67))
        axes.spines[["left", "right", "top"]].set_visible(False)
        for x, low, mean, high, _ in self.lines.values():
            [line] = axes.plot(x, mean, marker="o" if len(x) <= 60 else "", clip_on=False)
            if (low < high).any():
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        if self.from_zero:
            axes.axhline(0, color="none")
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlabel("iteration", labelpad=1)
        axes.set_title(self.unit, loc="left", fontsize="medium")
        first, last = axes.dataLim.intervalx
        if self.burn_in and first <= self.burn_in <= last:
            axes.axvline(self.burn_in, color="gray", linestyle=":", linewidth=1)
            side = "right" if self.burn_in > (first + last) / 2 else "left"
            top: dict[str, Any] = {"va": "top", "transform": axes.get_xaxis_transform()}
            axes.text(self.burn_in, 1, " burn-in ends ", ha=side, **top)
        return figure


def number(value: float, digits: int = 4) -> str:
    """Format a number.

    >>> number(0.123456), number(12345.6), number(250000.0), number(float("nan"))
    ('0.1235', '12,346', '250,000', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def ap_chart(stage: Stage, reference: float | None) -> list[Chart]:
    """Mask AP over iterations, if measured more than once; of the student with a ``reference``, the
    stage-1 teacher's."""
    found = {
        stage.model_name(key.split("/")[:-2]): curve
        for key, curve in stage.curves.items()
        if key.endswith(f"{MASKS}/AP")
    }
    if max((len(curve.iterations) for curve in found.values()), default=0) < 2:
        return []
    lines = dict(sorted(found.items(), reverse=True))
    if reference is not None and stage.model == STUDENT:
        x = np.concatenate([curve.iterations for curve in found.values()])
        ends, flat = np.array([x.min(), x.max()]), np.full(2, reference)
        lines["stage-1 teacher, at its end"] = Curve(ends, flat, flat, flat, reference)
    title = f"Mask AP while the {stage.model} is trained"
    return [Chart(title, "AP on validation images", lines, stage.burn_in)]


def stage_charts(stage: Stage) -> list[Chart]:
    """All charts of the stage except AP; charts without values are omitted."""
    curves = stage.curves
    both = {LABELED: LABELED, UNLABELED: UNLABELED} if UNLABELED in curves else {}
    wanted = [("Loss", "sum of weighted losses", {"total_loss": "total", **both})]
    for part, of_part in ((LABELED, "labeled images"), (UNLABELED, "pseudo-labels")):
        found = [name.partition(":")[2] for name in curves if name.startswith(f"{part}:")]
        kinds = [k for k in _KINDS if k in found] + sorted(set(found) - set(_KINDS) - {"loss_sd"})
        names = {f"{part}:{kind}": _KINDS.get(kind, kind) for kind in kinds}
        wanted.append((f"Loss on {of_part}", _LOSS_UNIT, names))
    charts = []
    for title, unit, names in wanted + _CHARTS:
        shown = {n: c for key, n in names.items() if len((c := curves[key]).mean)}
        if unit in _MOSTLY_ZERO:
            shown = {n: c for n, c in shown.items() if c.high.any()}
        if shown:
            charts.append(Chart(title, unit, shown, stage.burn_in, from_zero=unit != "IoU"))
    return charts
