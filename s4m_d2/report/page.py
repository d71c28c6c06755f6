"""A run as one HTML file, without scripts or external resources."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from markupsafe import Markup

from s4m_d2.errors import printable
from s4m_d2.files import atomic_write
from s4m_d2.report.charts import ap_chart, number, stage_charts
from s4m_d2.report.curves import finite
from s4m_d2.report.run import MODELS, Run, Stage

REPORT = "report.html"  # in OUTPUT_DIR
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FIRST, STUDENT, TUNED = MODELS.values()
CLASS = "AP-"  # before a class's name
_MINUTE = 60

Models = Mapping[str, Mapping[str, float | None]]


def write_report(folder: str, problem: str = "") -> str:
    """Write the page of a run into its folder (arguments as of :class:`Run`); returns its path."""
    page = render_page(Run(folder, problem))
    path = os.path.join(folder, REPORT)
    with atomic_write(path, "wb") as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def render_page(run: Run) -> str:
    """Render the page."""
    models = {name: values for stage in run.stages for name, values in stage.models()}
    aps = {name: finite(values.get("AP")) for name, values in models.items()}
    best = max(aps, key=lambda name: aps[name] or 0.0, default="")
    newest_first = run.stages[::-1]
    references = {STUDENT: aps.get(FIRST)}
    ap_charts = [c for s in newest_first for c in ap_chart(s, references.get(s.name))]
    return render(
        "page.html",
        run=run,
        started=any(stage.curves.records for stage in run.stages),
        models=models,
        measures=[m for m in MEASURES if any(m in values for values in models.values())],
        best=best if aps.get(best) else "",
        classes=list(_classes(models)),
        compared=FIRST in models and STUDENT in models,
        cards=[*_ap_cards(aps, best), *(card for s in run.stages for card in _stage_cards(s))],
        ap_charts=ap_charts,
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


def duration(seconds: float) -> str:
    """Format a duration.

    >>> duration(42), duration(425), duration(93_600)
    ('42 s', '7 min', '26 h 0 min')
    """
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    return f"{minutes} min" if minutes < 2 * _MINUTE else f"{minutes // 60:,} h {minutes % 60} min"


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
        yield f"≈ {duration(seconds * stage.done)}", what
    elif stage.done:
        yield f"{stage.done:,}{whole}", f"iterations of the {stage.model}"
    count = stage.curves.get("pseudo_labels/per_image").last
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
        if (count := stage.curves.get(name).last) > 0:  # NaN: unknown
            said.append(f"{count:,.0f} {text}.")
    return " ".join(said)
