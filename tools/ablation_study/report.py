"""The study's tables, in Markdown, from the results that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ablation_study.comparisons import COMPARISONS, PUBLISHED_MARGINS, Comparison
from ablation_study.figures import Results, Summary, labeling_summary, summary
from ablation_study.results import EMA, STUDENT, TEACHER
from ablation_study.runs import (
    COMPARED,
    FEW,
    FULL,
    FULL_PERCENT,
    GUIDED,
    MAIN_PERCENT,
    OTHER_PERCENTS,
    SUPERVISED,
    TEACHERS,
    Method,
    all_runs,
)
from ablation_study.times import minutes

NONE = "–"
# Scalars of metrics.json on the pseudo-labels, and how many decimals they are shown with.
_LABELING = {
    "an image": ("pseudo_labels/per_image", 1),
    "after ARP": ("pseudo_labels/per_image_after_arp", 1),
    "dropped by score": ("pseudo_labels/dropped_score", 2),
    "SAM's predicted IoU": ("refinement/predicted_iou", 2),
    "teacher's mask kept": ("refinement/fallbacks", 3),
}


def markdown(results: Results, seeds: Sequence[int]) -> str:
    """All of the report.

    Args:
        results: of finished runs, by name; what is missing is shown as missing.
        seeds: that are reported; the other shares of labels are of the first.
    """
    shown = ", ".join(map(str, seeds))
    lines = [
        f"AP of masks on toyscapes' validation images, in percent; seeds {shown}: mean ± sample "
        f"deviation, n: runs. {MAIN_PERCENT} % labels unless the row says otherwise.",
        "",
        *_methods(results, seeds),
        "",
        "What each part adds to the student's AP, paired by seed. A gain or loss is one that is "
        "larger than its deviation.",
        "",
        *_contributions(results, seeds),
        "",
        *_reading(results, seeds),
        "",
        "By the share of labels, the student's AP; the margin is that of S⁴M over Guided "
        "Distillation.",
        "",
        *_shares(results, seeds),
        "",
        "AP by class, student.",
        "",
        *_classes(results, seeds),
        "",
        "Pseudo-labels, means over the last tenth of burn-in and of the run: labels an image that "
        "the teacher gives, labels after ARP, share of queries dropped by their score, the IoU "
        "that SAM predicts for its masks, share of masks that SAM did not find.",
        "",
        *_labeling(results, seeds),
        "",
        *_making(results, seeds),
    ]
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def own_model(method: Method) -> str:
    """The model that a method is judged by."""
    return TEACHER if method.is_teacher else STUDENT


def _methods(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    rows = [(method, MAIN_PERCENT, method.title) for method in (*TEACHERS, *COMPARED)]
    rows.append((SUPERVISED, FULL_PERCENT, "supervised, 100 % labels (ceiling)"))

    def cells(method: Method, percent: int, title: str) -> list[str]:
        def of(model: str, key: str) -> Summary:
            return summary(results, method, seeds, percent=percent, model=model, key=key)

        own = of(own_model(method), "AP")
        figures = [own, of(own_model(method), "AP50"), of(EMA, "AP")]
        return [title, *map(str, figures), str(own.count)]

    header = ["", "AP", "AP50", "AP of the EMA teacher", "n"]
    return _table(header, (cells(*row) for row in rows))


def _difference(
    results: Results, comparison: Comparison, seeds: Sequence[int], model: str
) -> Summary:
    more = summary(results, comparison.more, seeds, model=model)
    return more.minus(summary(results, comparison.less, seeds, model=model))


def _contributions(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    def cells(comparison: Comparison) -> list[str]:
        own = _difference(results, comparison, seeds, comparison.model)
        by_seed = ", ".join(f"{value:+.1f}" for value in own.by_seed.values()) or NONE
        ema = _difference(results, comparison, seeds, EMA).text("+")
        verdict = comparison.verdict(own)
        return [comparison.title, own.text("+"), by_seed, ema, str(own.count), verdict]

    header = ["", "AP", "each seed", "EMA teacher", "n", "reading"]
    return _table(header, map(cells, COMPARISONS))


def _reading(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    """The comparisons by what they say, a line each."""
    found: dict[str, list[str]] = {}
    for comparison in COMPARISONS:
        verdict = comparison.verdict(_difference(results, comparison, seeds, comparison.model))
        found.setdefault(verdict, []).append(comparison.title)
    for verdict in sorted(found):
        yield f"- {verdict[0].upper()}{verdict[1:]}: {'; '.join(found[verdict])}."


def _shares(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    def cells(percent: int) -> list[str]:
        chosen = seeds if percent == MAIN_PERCENT else seeds[:1]
        found = {m: summary(results, m, chosen, percent=percent) for m in FEW}
        margin = found[FULL].minus(found[GUIDED])
        return [
            f"{percent} %",
            *(str(found[method]) for method in FEW),
            margin.text("+"),
            f"{PUBLISHED_MARGINS[percent]:+.1f}",
            str(margin.count),
        ]

    header = ["labels", *(m.title for m in FEW), "margin", "the paper's, on Cityscapes", "n"]
    return _table(header, map(cells, sorted((MAIN_PERCENT, *OTHER_PERCENTS))))


def _classes(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    names = dict.fromkeys(
        name
        for result in results.values()
        for model in result["models"].values()
        for name in model["by class"]
    )

    def cells(method: Method) -> list[str]:
        of = {"model": own_model(method), "key": "by class"}
        found = (summary(results, method, seeds, **of, name=name) for name in names)
        means = (NONE if one.mean is None else f"{one.mean:.1f}" for one in found)
        return [method.title, *means]

    return _table(["", *names], map(cells, (*TEACHERS, *COMPARED)))


def _labeling(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    def cells(method: Method) -> list[str]:
        row = [method.title]
        for key, digits in _LABELING.values():
            early, late = (
                labeling_summary(results, method, seeds, phase, key) for phase in ("burn-in", "end")
            )
            both = [NONE if s.mean is None else f"{s.mean:.{digits}f}" for s in (early, late)]
            row.append(NONE if both == [NONE, NONE] else " → ".join(both))
        return row

    return _table(["", *_LABELING], (cells(m) for m in COMPARED if m.has_student))


def _making(results: Results, seeds: Sequence[int]) -> Iterator[str]:
    """What was run, how long it took, with which code, and what is missing."""
    runs = all_runs(seeds)
    done = [results[run.name] for run in runs if run.name in results]
    yield f"- {len(done)} of {len(runs)} runs."
    if done:
        longest = max(done, key=lambda result: result["seconds"])
        total = sum(result["seconds"] for result in done)
        yield (
            f"- Together they took {minutes(total)}; the longest, {longest['name']}, "
            f"{minutes(longest['seconds'])}."
        )
        kinds = (("teachers", True), ("all others", False))
        for name, is_teacher in kinds:
            of_kind = {r["iterations"] for r in done if ("teacher" in r["method"]) == is_teacher}
            if of_kind:
                yield f"- Iterations, {name}: {', '.join(map(str, sorted(of_kind)))}."
        for key in ("data", "engine", "torch", "device", "commit"):
            values = dict.fromkeys(_plain(result.get(key)) for result in done)
            yield f"- {key.capitalize()}: {'; '.join(values)}."
        versions = {version for result in done for version in result["code"]}
        if len(versions) > 1:
            yield (
                f"- **The runs were made by {len(versions)} versions of the code** "
                f"({', '.join(sorted(versions))}): what differs between them may be the code."
            )
    missing = [run.name for run in runs if run.name not in results]
    if missing:
        yield f"- **Missing:** {', '.join(missing)}."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return "unknown" if value is None else str(value)
