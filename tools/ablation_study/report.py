"""The study's tables, in Markdown, and its chart, from the results that there are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablation_study import runs
from ablation_study.runs import EMA, FULL_PERCENT, MAIN_PERCENT, TEACHERS, Method, Plan, Run
from s4m_d2.files import atomic_write

NONE = "–"
# Scalars of metrics.json on the pseudo-labels, and how many decimals they are shown with.
_LABELING = {
    "per image": ("pseudo_labels/per_image", 1),
    "after ARP": ("pseudo_labels/per_image_after_arp", 1),
    "dropped by score": ("pseudo_labels/dropped_score", 2),
    "SAM's predicted IoU": ("refinement/predicted_iou", 2),
    "teacher's mask kept": ("refinement/fallbacks", 3),
}
# What is added: the method with it, the method without, and what the paper finds: a gain (+1), a
# loss (-1), or nothing (0).
COMPARISONS = {
    "unlabeled images (Guided Distillation − supervised)": (runs.GUIDED, runs.SUPERVISED, 1),
    "SD, in the stage-1 teacher": (runs.SD_TEACHER, runs.PLAIN_TEACHER, 1),
    "SD": (runs.SD, runs.GUIDED, 1),
    "SD, with PR": (runs.SD_PR, runs.PR, 1),
    "PR": (runs.PR, runs.GUIDED, 1),
    "PR, with SD": (runs.SD_PR, runs.SD, 1),
    "PR, with SD and ARP": (runs.FULL, runs.SD_ARP, 1),
    "ARP, with SD and PR": (runs.FULL, runs.SD_PR, 1),
    "ARP, with SD, without PR": (runs.SD_ARP, runs.SD, -1),
    "all of S⁴M (− Guided Distillation)": (runs.FULL, runs.GUIDED, 1),
    "dropping duplicates, with all of S⁴M (not in the paper)": (runs.UNIQUE, runs.FULL, 0),
    "adapted SAM, no duplicates, no SD (− S⁴M; not in the paper)": (runs.ADAPTED, runs.FULL, 0),
    "a student that starts as the teacher (not in the paper)": (runs.WARM, runs.ADAPTED, 0),
    "best S⁴M (− Guided Distillation)": (runs.WARM, runs.GUIDED, 1),
    "best S⁴M (− supervised)": (runs.WARM, runs.SUPERVISED, 1),
}
# Colors that the color-blind tell apart (Okabe and Ito).
_TEACHER, _OTHER = "0.75", "#56B4E9"
_LOOKS = {  # and markers
    runs.SUPERVISED: ("0.45", "o"),
    runs.GUIDED: ("#E69F00", "s"),
    runs.FULL: ("#009E73", "^"),
    runs.ADAPTED: ("#CC79A7", "D"),
    runs.WARM: ("#0072B2", "v"),
}


@dataclass(frozen=True)
class Summary:
    """A figure of each seed that has it."""

    by_seed: Mapping[int, float]

    @property
    def count(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.by_seed.values()) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """The sample deviation; None of fewer than two."""
        return statistics.stdev(self.by_seed.values()) if self.count > 1 else None

    def minus(self, other: Summary) -> Summary:
        """The differences in the seeds that both have."""
        seeds = [seed for seed in self.by_seed if seed in other.by_seed]
        return Summary({seed: self.by_seed[seed] - other.by_seed[seed] for seed in seeds})

    def text(self, sign: str = "") -> str:
        """Mean ± deviation; ``sign`` "+" shows that of a positive mean."""
        if self.mean is None:
            return NONE
        return f"{self.mean:{sign}.1f}" + ("" if self.count < 2 else f" ± {self.deviation:.1f}")

    def __str__(self) -> str:
        return self.text()

    def reading(self, expected: int = 0) -> str:
        """What a difference says, and whether it is what was ``expected``."""
        if self.mean is None or self.deviation is None:
            return "missing" if self.mean is None else "one seed: no deviation"
        if abs(self.mean) <= self.deviation:
            return "within the deviation"
        change = "gain" if self.mean > 0 else "loss"
        agrees = "as" if self.mean * expected > 0 else "not as"
        return f"{change}, {agrees} in the paper" if expected else change


@dataclass(frozen=True)
class Report:
    """Of a plan's finished runs, whose ``results`` are given by name."""

    results: Mapping[str, Mapping[str, Any]]
    plan: Plan
    seeds: Sequence[int]

    def summary(self, method: Method, *keys: str, percent: int = MAIN_PERCENT) -> Summary:
        """A method's figure over the seeds that have it: what is at ``keys``, or its AP."""
        values = {}
        for seed in self.seeds:
            value: Any = self.results.get(Run(method, percent, seed).name)
            for key in keys or ("models", method.model, "AP"):
                value = (value or {}).get(key)
            if value is not None:
                values[seed] = value
        return Summary(values)

    @property
    def methods(self) -> tuple[Method, ...]:
        """In the order of the tables."""
        return TEACHERS + self.plan.compared

    def markdown(self) -> str:
        """All tables; what is missing is shown as missing."""
        shown = ", ".join(map(str, self.seeds))
        parts = {
            f"Mask AP on {self.plan.title}, in percent; seeds {shown}: mean ± sample "
            f"deviation, n: runs. {MAIN_PERCENT} % labels unless the row says otherwise.": _methods,
            "Change of the student's AP by each part, paired by seed. It counts as a gain or loss "
            "if it is larger than its deviation.": _contributions,
            "The student's AP by share of labels; the margin is that of the row's last method over "
            "Guided Distillation.": _shares,
            "The student's AP by class.": _classes,
            "Pseudo-labels, means over the last tenth of burn-in → of the run: selected labels per "
            "image, labels per image after ARP, share of queries dropped by their score, predicted "
            "IoU of SAM's masks, share of empty SAM masks (the teacher's mask is kept).": _labeling,
        }
        texts = [f"{text}\n\n" + "\n".join(table(self)) for text, table in parts.items()]
        return "\n\n".join([*texts, "\n".join(_making(self))]) + "\n"

    def draw(self, path: Path) -> None:
        """Write the chart, a PNG; what is missing is left out, and named at its place."""
        figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
        bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_bars(bars, self)
        _draw_shares(lines, self)
        for axes in (bars, lines):
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _methods(report: Report) -> Iterator[str]:
    rows = [(method, MAIN_PERCENT, method.title) for method in report.methods]
    rows.append((runs.SUPERVISED, FULL_PERCENT, "supervised, 100 % labels (ceiling)"))

    def cells(method: Method, percent: int, title: str) -> list[str]:
        places = [(method.model, "AP"), (method.model, "AP50"), (EMA, "AP")]
        found = [report.summary(method, "models", *place, percent=percent) for place in places]
        return [title, *map(str, found), str(found[0].count)]

    header = ["", "AP", "AP50", "AP of the EMA teacher", "n"]
    return _table(header, (cells(*row) for row in rows))


def _contributions(report: Report) -> Iterator[str]:
    """The table of the comparisons, and a line for each of their readings."""
    rows, readings = [], {}
    for title, (more, less, expected) in COMPARISONS.items():
        if not {more, less} <= {*report.methods}:
            continue
        own = report.summary(more).minus(report.summary(less))
        ema = [report.summary(method, "models", EMA, "AP") for method in (more, less)]
        by_seed = ", ".join(f"{value:+.1f}" for value in own.by_seed.values()) or NONE
        reading = own.reading(expected)
        row = [title, own.text("+"), by_seed, ema[0].minus(ema[1]).text("+"), str(own.count)]
        rows.append([*row, reading])
        readings.setdefault(reading, []).append(title)
    yield from _table(["", "AP", "each seed", "EMA teacher", "n", "reading"], rows)
    yield ""
    for reading in sorted(readings):
        yield f"- {reading[0].upper()}{reading[1:]}: {'; '.join(readings[reading])}."


def _shares(report: Report) -> Iterator[str]:
    plan = report.plan

    def cells(percent: int) -> list[str]:
        found = {method: report.summary(method, percent=percent) for method in plan.few}
        margin = found[plan.few[-1]].minus(found[runs.GUIDED])
        published = f"{plan.published[percent]:+.1f}" if percent in plan.published else NONE
        own = [f"{percent} %", *map(str, found.values()), margin.text("+")]
        return [*own, published, str(margin.count)]

    header = ["labels", *(m.title for m in plan.few), "margin", "the paper's, on Cityscapes", "n"]
    return _table(header, map(cells, plan.percents))


def _classes(report: Report) -> Iterator[str]:
    models = [model for result in report.results.values() for model in result["models"].values()]
    names = list(dict.fromkeys(name for model in models for name in model["by class"]))

    def cells(method: Method) -> list[str]:
        places = [("models", method.model, "by class", name) for name in names]
        means = [report.summary(method, *place).mean for place in places]
        return [method.title, *(NONE if mean is None else f"{mean:.1f}" for mean in means)]

    return _table(["", *names], map(cells, report.methods))


def _labeling(report: Report) -> Iterator[str]:
    def cells(method: Method) -> list[str]:
        row = [method.title]
        for key, digits in _LABELING.values():
            places = [("pseudo-labels", phase, key) for phase in ("burn-in", "end")]
            means = [report.summary(method, *place).mean for place in places]
            both = [NONE if mean is None else f"{mean:.{digits}f}" for mean in means]
            row.append(NONE if both == [NONE, NONE] else " → ".join(both))
        return row

    return _table(["", *_LABELING], (cells(m) for m in report.plan.compared if m.has_student))


def _making(report: Report) -> Iterator[str]:
    """What was run, how long it took, with which code, and what is missing."""
    results, plan, seeds = report.results, report.plan, report.seeds
    missing = [run.name for run in runs.all_runs(plan, seeds) if run.name not in results]
    wanted = runs.all_runs(plan, seeds, every_seed=True)
    done = [results[run.name] for run in wanted if run.name in results]
    yield f"- {len(done)} of {len(done) + len(missing)} runs."
    if done:
        longest = max(done, key=lambda result: result["seconds"])
        total = sum(result["seconds"] for result in done)
        yield (
            f"- Together they took {minutes(total)}; the longest, {longest['name']}, "
            f"{minutes(longest['seconds'])}."
        )
        for name, is_teacher in (("teachers", True), ("all others", False)):
            of_kind = {r["iterations"] for r in done if ("teacher" in r["method"]) == is_teacher}
            yield f"- Iterations, {name}: {', '.join(map(str, sorted(of_kind)))}."
        for key in ("data", "engine", "torch", "device", "commit"):
            values = dict.fromkeys(_plain(result.get(key)) for result in done)
            yield f"- {key.capitalize()}: {'; '.join(values)}."
    if missing:
        yield f"- **Missing:** {', '.join(missing)}."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return "unknown" if value is None else str(value)


def minutes(seconds: float) -> str:
    """In minutes, or in hours where they are many."""
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _draw_bars(axes: Axes, report: Report) -> None:
    """A bar a method with its deviation, a dot a seed, a line for the ceiling."""
    for place, method in enumerate(report.methods):
        found = report.summary(method)
        if found.mean is None:
            axes.text(0, place, " missing", va="center", color="0.5")
            continue
        color = _TEACHER if method.is_teacher else _LOOKS.get(method, (_OTHER,))[0]
        axes.barh(place, found.mean, xerr=found.deviation, color=color, capsize=3, ecolor="0.2")
        dots = list(found.by_seed.values())
        axes.plot(dots, [place] * len(dots), "o", color="black", markersize=3)
        end = max(*dots, found.mean + (found.deviation or 0)), place
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(found.text(), end, bbox=white, **beside)
    ceiling = report.summary(runs.SUPERVISED, percent=FULL_PERCENT)
    if ceiling.mean is not None:
        label = f"supervised, 100 % labels: {ceiling}"
        axes.axvline(ceiling.mean, color="0.3", linestyle="--", label=label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    titles = [method.title for method in report.methods]
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)  # the first on top; a row where a bar is missing too
    axes.margins(x=0.2)
    axes.set_xlabel(f"mask AP at {MAIN_PERCENT} % labels (bar: mean; dots: seeds)")


def _draw_shares(axes: Axes, report: Report) -> None:
    """A line a method; the deviation where there is more than one seed."""
    percents = report.plan.percents
    for method in report.plan.few:
        found = {percent: report.summary(method, percent=percent) for percent in percents}
        found = {percent: summary for percent, summary in found.items() if summary.count}
        means = [summary.mean for summary in found.values()]
        deviations = [summary.deviation or math.nan for summary in found.values()]
        color, marker = _LOOKS[method]
        look = {"color": color, "marker": marker, "markersize": 5, "capsize": 3}
        axes.errorbar(list(found), means, deviations, label=method.title, **look)
    axes.set_xticks(percents, [f"{percent} %" for percent in percents])
    axes.set_xlabel("images with labels")
    axes.set_ylabel("mask AP")
    axes.legend(frameon=False)
