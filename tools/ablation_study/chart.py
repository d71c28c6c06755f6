"""The study's chart: AP of each method, and AP by the share of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablation_study import runs
from ablation_study.report import Results, summary
from ablation_study.runs import FULL_PERCENT, MAIN_PERCENT, TEACHERS, Plan
from s4m_d2.files import atomic_write

# Colors that the color-blind tell apart (Okabe and Ito).
_TEACHER, _OTHER = "0.75", "#56B4E9"
_METHODS = (runs.SUPERVISED, runs.GUIDED, runs.FULL, runs.ADAPTED)
_COLORS = dict(zip(_METHODS, ("0.45", "#E69F00", "#009E73", "#CC79A7"), strict=True))
_MARKERS = dict(zip(_METHODS, "os^D", strict=True))


def draw_chart(results: Results, plan: Plan, seeds: Sequence[int], path: Path) -> None:
    """Write a PNG; what is missing is left out, and named at its place."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_bars(bars, results, plan, seeds)
    _draw_shares(lines, results, plan, seeds)
    for axes in (bars, lines):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def _draw_bars(axes: Axes, results: Results, plan: Plan, seeds: Sequence[int]) -> None:
    """A bar a method with its deviation, a dot a seed, a line for the ceiling."""
    methods = [*TEACHERS, *plan.compared]
    for place, method in enumerate(methods):
        found = summary(results, method, seeds)
        if found.mean is None:
            axes.text(0, place, " missing", va="center", color="0.5")
            continue
        color = _TEACHER if method.is_teacher else _COLORS.get(method, _OTHER)
        axes.barh(place, found.mean, xerr=found.deviation, color=color, capsize=3, ecolor="0.2")
        dots = list(found.by_seed.values())
        axes.plot(dots, [place] * len(dots), "o", color="black", markersize=3)
        end = max(*dots, found.mean + (found.deviation or 0))
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(
            found.text(), (end, place), (6, 0), textcoords="offset points", va="center", bbox=white
        )
    ceiling = summary(results, runs.SUPERVISED, seeds, percent=FULL_PERCENT)
    if ceiling.mean is not None:
        label = f"supervised, 100 % labels: {ceiling}"
        axes.axvline(ceiling.mean, color="0.3", linestyle="--", label=label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes.set_yticks(range(len(methods)), [method.title for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)  # the first on top; a row where a bar is missing too
    axes.margins(x=0.2)
    axes.set_xlabel(f"mask AP at {MAIN_PERCENT} % labels (bar: mean; dots: seeds)")


def _draw_shares(axes: Axes, results: Results, plan: Plan, seeds: Sequence[int]) -> None:
    """A line a method; the deviation where there is more than one seed."""
    percents = plan.percents
    for method in plan.few:
        found = {p: summary(results, method, seeds, percent=p) for p in percents}
        present = [percent for percent in percents if found[percent].count]
        axes.errorbar(
            present,
            [found[percent].mean for percent in present],
            [found[percent].deviation or math.nan for percent in present],
            color=_COLORS[method],
            marker=_MARKERS[method],
            markersize=5,
            capsize=3,
            label=method.title,
        )
    axes.set_xticks(percents, [f"{percent} %" for percent in percents])
    axes.set_xlabel("images with labels")
    axes.set_ylabel("mask AP")
    axes.legend(frameon=False)
