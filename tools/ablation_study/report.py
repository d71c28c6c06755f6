"""The study's tables, in Markdown, from the results that there are."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablation_study import runs
from ablation_study.runs import FULL_PERCENT, MAIN_PERCENT, TEACHERS, Method, Plan, Run, all_runs
from ablation_study.training import EMA, STUDENT, TEACHER

Results = Mapping[str, Mapping[str, Any]]  # of finished runs, by name
NONE = "–"
GAIN, LOSS = "gain", "loss"
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
    "best S⁴M (− Guided Distillation)": (runs.ADAPTED, runs.GUIDED, 1),
    "best S⁴M (− supervised)": (runs.ADAPTED, runs.SUPERVISED, 1),
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
        agrees = "as" if self.mean * expected > 0 else "not as"
        return (GAIN if self.mean > 0 else LOSS) + (f", {agrees} in the paper" if expected else "")


def own_model(method: Method) -> str:
    """The model that a method is judged by."""
    return TEACHER if method.is_teacher else STUDENT


def summary(
    results: Results, method: Method, seeds: Sequence[int], *keys: str, percent: int = MAIN_PERCENT
) -> Summary:
    """A method's figure over the seeds that have it: what a result has at ``keys``, or its AP."""
    values = {}
    for seed in seeds:
        value: Any = results.get(Run(method, percent, seed).name)
        for key in keys or ("models", own_model(method), "AP"):
            value = (value or {}).get(key)
        if value is not None:
            values[seed] = value
    return Summary(values)


def markdown(results: Results, plan: Plan, seeds: Sequence[int]) -> str:
    """All of the report, of the finished runs by name; what is missing is shown as missing."""
    shown = ", ".join(map(str, seeds))
    parts = {
        f"Mask AP on {plan.title}, in percent; seeds {shown}: mean ± sample "
        f"deviation, n: runs. {MAIN_PERCENT} % labels unless the row says otherwise.": _methods,
        "Change of the student's AP by each part, paired by seed. It counts as a gain or loss if "
        "it is larger than its deviation.": _contributions,
        "The student's AP by share of labels; the margin is that of the row's last method over "
        "Guided Distillation.": _shares,
        "The student's AP by class.": _classes,
        "Pseudo-labels, means over the last tenth of burn-in → of the run: selected labels per "
        "image, labels per image after ARP, share of queries dropped by their score, predicted IoU "
        "of SAM's masks, share of empty SAM masks (the teacher's mask is kept).": _labeling,
    }
    texts = [f"{text}\n\n" + "\n".join(of(results, plan, seeds)) for text, of in parts.items()]
    return "\n\n".join([*texts, "\n".join(_making(results, plan, seeds))]) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _methods(results: Results, plan: Plan, seeds: Sequence[int]) -> Iterator[str]:
    rows = [(method, MAIN_PERCENT, method.title) for method in (*TEACHERS, *plan.compared)]
    rows.append((runs.SUPERVISED, FULL_PERCENT, "supervised, 100 % labels (ceiling)"))

    def cells(method: Method, percent: int, title: str) -> list[str]:
        places = [(own_model(method), "AP"), (own_model(method), "AP50"), (EMA, "AP")]
        found = [summary(results, method, seeds, "models", *p, percent=percent) for p in places]
        return [title, *map(str, found), str(found[0].count)]

    header = ["", "AP", "AP50", "AP of the EMA teacher", "n"]
    return _table(header, (cells(*row) for row in rows))


def _contributions(results: Results, plan: Plan, seeds: Sequence[int]) -> Iterator[str]:
    """The table of the comparisons, and a line for each of their readings."""
    rows, readings = [], {}
    for title, (more, less, expected) in COMPARISONS.items():
        if not {more, less} <= {*TEACHERS, *plan.compared}:
            continue
        own = summary(results, more, seeds).minus(summary(results, less, seeds))
        ema = [summary(results, method, seeds, "models", EMA, "AP") for method in (more, less)]
        by_seed = ", ".join(f"{value:+.1f}" for value in own.by_seed.values()) or NONE
        reading = own.reading(expected)
        row = [title, own.text("+"), by_seed, ema[0].minus(ema[1]).text("+"), str(own.count)]
        rows.append([*row, reading])
        readings.setdefault(reading, []).append(title)
    yield from _table(["", "AP", "each seed", "EMA teacher", "n", "reading"], rows)
    yield ""
    for reading in sorted(readings):
        yield f"- {reading[0].upper()}{reading[1:]}: {'; '.join(readings[reading])}."


def _shares(results: Results, plan: Plan, seeds: Sequence[int]) -> Iterator[str]:
    def cells(percent: int) -> list[str]:
        found = {m: summary(results, m, seeds, percent=percent) for m in plan.few}
        margin = found[plan.few[-1]].minus(found[runs.GUIDED])
        published = f"{plan.published[percent]:+.1f}" if percent in plan.published else NONE
        own = [f"{percent} %", *map(str, found.values()), margin.text("+")]
        return [*own, published, str(margin.count)]

    header = ["labels", *(m.title for m in plan.few), "margin", "the paper's, on Cityscapes", "n"]
    return _table(header, map(cells, plan.percents))


def _classes(results: Results, plan: Plan, seeds: Sequence[int]) -> Iterator[str]:
    models = [model for result in results.values() for model in result["models"].values()]
    names = list(dict.fromkeys(name for model in models for name in model["by class"]))

    def cells(method: Method) -> list[str]:
        place = "models", own_model(method), "by class"
        means = [summary(results, method, seeds, *place, name).mean for name in names]
        return [method.title, *(NONE if mean is None else f"{mean:.1f}" for mean in means)]

    return _table(["", *names], map(cells, (*TEACHERS, *plan.compared)))


def _labeling(results: Results, plan: Plan, seeds: Sequence[int]) -> Iterator[str]:
    def cells(method: Method) -> list[str]:
        row = [method.title]
        for key, digits in _LABELING.values():
            phases = ("burn-in", "end")
            means = [summary(results, method, seeds, "pseudo-labels", p, key).mean for p in phases]
            both = [NONE if mean is None else f"{mean:.{digits}f}" for mean in means]
            row.append(NONE if both == [NONE, NONE] else " → ".join(both))
        return row

    return _table(["", *_LABELING], (cells(m) for m in plan.compared if m.has_student))


def _making(results: Results, plan: Plan, seeds: Sequence[int]) -> Iterator[str]:
    """What was run, how long it took, with which code, and what is missing."""
    wanted = [run.name for run in all_runs(plan, seeds)]
    names = [run.name for run in all_runs(plan, seeds, every_seed=True) if run.name in results]
    done, missing = [results[name] for name in names], [n for n in wanted if n not in results]
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
