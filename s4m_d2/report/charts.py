"""The charts of a stage: choice of curves, and drawing as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from s4m_d2.report.curves import LABELED, MEASURES, UNLABELED, Curve
from s4m_d2.report.run import MASKS, Stage

WIDTH, HEIGHT = 460, 240  # of the picture, in its own units
PLOT = (0.125, 0.175, 0.845, 0.67)  # left, bottom, width, height, as shares of it
MOST_DOTS = 60  # points; a longer curve is drawn without dots
# Okabe and Ito's colors, which are distinguishable with color blindness; the page's style sheet
# names them c0 to c5.
CURVES = ("#0072b2", "#d55e00", "#00916a", "#b0578d", "#b07d00", "#6b7280")
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "s4m_d2",  # the same chart is the same text
    "svg.fonttype": "none",
    "text.usetex": False,
    "text.parse_math": False,
    "font.size": 11.5,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
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
    (
        "SAM's own estimate of refined masks",
        "IoU",
        {"refinement/predicted_iou": "predicted IoU"},
    ),
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


class Line(NamedTuple):
    """A named curve; a band shows minimum and maximum of points that summarize several values."""

    name: str
    curve: Curve
    color: int = 0  # of CURVES
    dashed: bool = False


class Chart(NamedTuple):
    """Lines over iterations."""

    title: str
    unit: str  #: of the values
    lines: Sequence[Line]  #: at least one
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
        for name, curve, *_ in self.lines:
            values = (curve.mean[0], curve.mean[-1], curve.low.min(), curve.high.max())
            first, last, least, most = map(number, values)
            said.append(f"{name} from {first} to {last}, least {least}, greatest {most}")
        return f"{self.title}, {self.unit}: {'; '.join(said)}"

    def figure(self) -> Figure:
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes(PLOT)
        for line in self.lines:
            curve, color = line.curve, CURVES[line.color % len(CURVES)]
            x, style = curve.iterations, "--" if line.dashed else "-"
            if (curve.low < curve.high).any():
                axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
            marker = "o" if len(x) <= MOST_DOTS else ""
            axes.plot(x, curve.mean, color=color, linestyle=style, marker=marker, clip_on=False)
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
    """Mask AP over iterations, if measured more than once; ``reference``: the stage-1 teacher's."""
    found = {
        stage.model_name(key.split("/")[:-2]): curve
        for key, curve in stage.curves.by_name.items()
        if key.endswith(f"{MASKS}/AP")
    }
    if max((len(curve.iterations) for curve in found.values()), default=0) < 2:
        return []
    lines = [
        Line(name, curve, color, dashed="EMA" in name)
        for color, (name, curve) in enumerate(sorted(found.items(), reverse=True))
    ]
    if reference is not None:
        x = np.concatenate([curve.iterations for curve in found.values()])
        ends, flat = np.array([x.min(), x.max()]), np.full(2, reference)
        constant = Curve(ends, flat, flat, flat, reference)
        lines.append(Line("stage-1 teacher, at its end", constant, len(CURVES) - 1, dashed=True))
    title = f"Mask AP while the {stage.model} is trained"
    return [Chart(title, "AP on validation images", lines, stage.burn_in)]


def stage_charts(stage: Stage) -> list[Chart]:
    """All charts of the stage except AP; charts without values are omitted."""
    curves = stage.curves.by_name
    both = {LABELED: LABELED, UNLABELED: UNLABELED} if UNLABELED in curves else {}
    wanted = [("Loss", "sum of weighted losses", {"total_loss": "total", **both})]
    for part, of_part in ((LABELED, "labeled images"), (UNLABELED, "pseudo-labels")):
        found = [name.partition(":")[2] for name in curves if name.startswith(f"{part}:")]
        kinds = [k for k in _KINDS if k in found] + sorted(set(found) - set(_KINDS) - {"loss_sd"})
        names = {f"{part}:{kind}": _KINDS.get(kind, kind) for kind in kinds}
        wanted.append((f"Loss on {of_part}", _LOSS_UNIT, names))
    charts = []
    for title, unit, names in wanted + _CHARTS:
        shown = [(n, c) for key, n in names.items() if len((c := stage.curves.get(key)).mean)]
        if unit in _MOSTLY_ZERO:
            shown = [(n, c) for n, c in shown if c.high.any()]
        if shown:
            colored = enumerate(shown)
            lines = [Line(n, c, color, dashed=color >= len(CURVES)) for color, (n, c) in colored]
            charts.append(Chart(title, unit, lines, stage.burn_in, from_zero=unit != "IoU"))
    return charts
