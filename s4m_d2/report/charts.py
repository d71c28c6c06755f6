"""Which curves a stage has, and which of them share a chart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from s4m_d2.report.curves import Curve, Point
from s4m_d2.report.run import MASKS, Stage
from s4m_d2.report.svg import COLORS, Mark, Series, chart, escape, number

LABELED, UNLABELED = "labeled", "unlabeled"
DISTILLATION = "loss_sd"
MEASURES = ("class_accuracy", "sq", "precision", "recall", "pq")
# Names of the losses for people; others keep theirs.
_KINDS = {
    "loss_ce": "class",
    "loss_mask": "mask, cross-entropy",
    "loss_dice": "mask, dice",
    DISTILLATION: "structural distillation",
}
_KEPT = re.compile(r"total_loss|lr|time|data_time|(pseudo_labels|refinement|data|train)/.+")
_QUALITY = re.compile(rf"pseudo_label_quality/(before|after)/({'|'.join(MEASURES)})")
_AP = re.compile(rf"((?:.+/)?){MASKS}/AP")
_UNSUP = "unsup/"


@dataclass(frozen=True)
class Chart:
    """A chart and what stands around it."""

    title: str
    unit: str
    series: Sequence[Series]
    from_zero: bool = True

    def html(self, marks: Sequence[Mark]) -> str:
        keys = "".join(_key(one) for one in self.series)
        svg = chart(self.title, self.unit, self.series, marks, from_zero=self.from_zero)
        return (
            f"<figure class='chart'><figcaption><b>{escape(self.title)}</b>"
            f"<span class='keys'>{keys}</span></figcaption>{svg}</figure>"
        )


def derive(record: Mapping[str, float]) -> dict[str, float]:
    """The values of curves in a record of metrics.json.

    The losses of all layers are summed by kind: "labeled:loss_ce", "unlabeled:loss_ce" and so on,
    and "labeled" and "unlabeled" for all kinds together. Other values keep their names.
    """
    values: dict[str, float] = {}
    for key, value in record.items():
        name = key.removeprefix(_UNSUP)
        if name.startswith("loss"):
            part = UNLABELED if key.startswith(_UNSUP) else LABELED
            kind = re.sub(r"_\d+$", "", name)
            values[part] = values.get(part, 0.0) + value
            values[f"{part}:{kind}"] = values.get(f"{part}:{kind}", 0.0) + value
        elif _KEPT.fullmatch(key) or _AP.fullmatch(key) or _QUALITY.fullmatch(key):
            values[key] = value
    return values


def stage_charts(stage: Stage) -> str:
    """The stage's charts but that of AP, as HTML."""
    marks = burn_in(stage)
    charts = [c for c in _charts(stage) if any(series.points for series in c.series)]
    return "".join(one.html(marks) for one in charts)


def burn_in(stage: Stage) -> list[Mark]:
    return [Mark(stage.burn_in, "burn-in ends")] if stage.burn_in else []


def ap_chart(stage: Stage, reference: float | None) -> str:
    """Mask AP over iterations, "" where it was measured no more than once.

    Args:
        reference: AP of the stage-1 teacher, for stage 2.
    """
    curves = {
        stage.model_name([part for part in path.split("/") if part]): curve
        for path, curve in _named(stage, _AP)
    }
    if max((len(curve.points) for curve in curves.values()), default=0) < 2:
        return ""
    series = [
        Series(name, curve.points, color, dashed="EMA" in name)
        for color, (name, curve) in enumerate(sorted(curves.items(), reverse=True))
    ]
    if reference is not None:
        places = [p.iteration for one in series for p in one.points]
        ends = min(places), max(places)
        flat = [Point(end, reference, reference, reference) for end in ends]
        series.append(Series("stage-1 teacher, at its end", flat, COLORS - 1, dashed=True))
    title = f"Mask AP while the {stage.name} is trained"
    return Chart(title, "AP on validation images", series).html(burn_in(stage))


def _charts(stage: Stage) -> Iterator[Chart]:
    total = [("total", "total_loss"), (LABELED, LABELED), (UNLABELED, UNLABELED)]
    if not stage.curves.get(UNLABELED).points:
        total = total[:1]
    yield Chart("Loss", "sum of weighted losses", _series(stage, total))
    for part in (LABELED, UNLABELED):
        kinds = [
            (_KINDS.get(kind, kind), f"{part}:{kind}")
            for kind in _kinds(stage, part)
            if kind != DISTILLATION
        ]
        title = f"Loss on {part} images" if part == LABELED else "Loss on pseudo-labels"
        yield Chart(title, "weighted, sum of all decoder layers", _series(stage, kinds))
    distillation = [(_KINDS[DISTILLATION], f"{LABELED}:{DISTILLATION}")]
    yield Chart("Structural distillation", "weighted loss", _series(stage, distillation))
    yield from _label_charts(stage)
    yield from _quality_charts(stage)
    yield Chart(
        "Learning rate", "of the first parameter group", _series(stage, [("learning rate", "lr")])
    )
    times = [("iteration", "time"), ("waiting for data", "data_time")]
    yield Chart("Time", "seconds an iteration", _series(stage, times))


def _kinds(stage: Stage, part: str) -> list[str]:
    """The kinds of losses on a part of the images: those with a name for people first."""
    prefix = f"{part}:"
    found = [name.removeprefix(prefix) for name in stage.curves.by_name if name.startswith(prefix)]
    known = [kind for kind in _KINDS if kind in found]
    return known + sorted(set(found) - set(known))


def _label_charts(stage: Stage) -> Iterator[Chart]:
    counts = [
        ("of the teacher", "per_image"),
        ("after ARP", "per_image_after_arp"),
        ("dropped as duplicates", "duplicates_per_image"),
    ]
    yield Chart("Pseudo-labels", "an image", _prefixed(stage, "pseudo_labels/", counts))
    dropped = [
        ("no object", "dropped_no_object"),
        ("score too low", "dropped_score"),
        ("mask too small", "dropped_area"),
        ("not finite", "dropped_non_finite"),
    ]
    series = _not_zero(_prefixed(stage, "pseudo_labels/", dropped))
    yield Chart("Predictions dropped, by the first rule that does", "share of the queries", series)
    ious = _prefixed(stage, "refinement/", [("predicted IoU", "predicted_iou")])
    yield Chart("SAM's own estimate of refined masks", "IoU", ious, from_zero=False)
    empty = _not_zero(_prefixed(stage, "refinement/", [("empty masks", "fallbacks")]))
    yield Chart("Refined masks that were empty", "share; the teacher's is kept", empty)


def _quality_charts(stage: Stage) -> Iterator[Chart]:
    names = {"sq": "SQ (IoU of matches)", "pq": "PQ"}
    for measure in MEASURES:
        steps = [("teacher's masks", f"before/{measure}"), ("refined by SAM", f"after/{measure}")]
        title = f"Pseudo-label quality: {names.get(measure, measure.replace('_', ' '))}"
        series = _prefixed(stage, "pseudo_label_quality/", steps)
        yield Chart(title, "share, against the true labels", series)


def _prefixed(stage: Stage, prefix: str, names: Sequence[tuple[str, str]]) -> list[Series]:
    return _series(stage, [(title, prefix + name) for title, name in names])


def _series(stage: Stage, names: Sequence[tuple[str, str]]) -> list[Series]:
    """(title, name of a curve) → those that the stage has."""
    found = [(title, stage.curves.get(name).points) for title, name in names]
    present = [(title, points) for title, points in found if points]
    return [
        Series(title, points, color, dashed=color >= COLORS)
        for color, (title, points) in enumerate(present)
    ]


def _not_zero(series: Sequence[Series]) -> list[Series]:
    """Without those that are 0 all the time."""
    return [one for one in series if any(p.high != 0 for p in one.points)]


def _named(stage: Stage, pattern: re.Pattern[str]) -> Iterator[tuple[str, Curve]]:
    for name, curve in stage.curves.by_name.items():
        if match := pattern.fullmatch(name):
            yield match[1].rstrip("/"), curve


def _key(one: Series) -> str:
    """A line of the legend, with the last value."""
    last = next((p.mean for p in reversed(one.points) if math.isfinite(p.mean)), math.nan)
    dashed = " dashed" * one.dashed
    return (
        f"<span><svg class='swatch' viewBox='0 0 22 8' aria-hidden='true'>"
        f"<path class='line c{one.color % COLORS}{dashed}' d='M1 4h20'/></svg>"
        f"{escape(one.name)} <em>{number(last)}</em></span>"
    )
