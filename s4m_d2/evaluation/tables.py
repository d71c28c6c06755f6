"""The quality of pseudo-labels as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tabulate import tabulate

from s4m_d2.evaluation.measures import COUNTS, Quality
from s4m_d2.evaluation.pseudo_label_quality import PseudoLabelQuality

_COLUMNS = {
    "instances": "instances",
    "pseudo_labels": "labels",
    "duplicates": "duplicates",
    "found": "found",
    "class_accuracy": "class acc.",
    "sq": "SQ",
    "precision": "precision",
    "recall": "recall",
    "mask_precision": "mask prec.",
    "mask_recall": "mask rec.",
    "pq": "PQ",
}


def quality_tables(steps: Mapping[str, PseudoLabelQuality]) -> list[str]:
    """Three Markdown tables, shares in percent: of all pseudo-labels, by size and by class.

    Args:
        steps: "before" and "after" refinement, or one of them, of the same images.
    """
    overall = [("all", step, quality.overall()) for step, quality in steps.items()]
    groups = [
        _interleaved({step: quality.by_size() for step, quality in steps.items()}),
        _interleaved({step: quality.by_class() for step, quality in steps.items()}),
    ]
    names = ("", "size", "class")
    return [_table(name, rows) for name, rows in zip(names, [overall, *groups], strict=True)]


def _interleaved(
    steps: Mapping[str, Mapping[str, Quality]],
) -> list[tuple[str, str, Quality]]:
    """(group, step, quality), the steps of a group together; groups of nothing are left out."""
    names = next(iter(steps.values()))
    rows = [(name, step, groups[name]) for name in names for step, groups in steps.items()]
    return [row for row in rows if row[2].instances or row[2].pseudo_labels]


def _table(name: str, rows: Iterable[tuple[str, str, Quality]]) -> str:
    cells = [(group, step, *(_cell(q, key) for key in _COLUMNS)) for group, step, q in rows]
    return tabulate(
        cells,
        (name, "refinement", *_COLUMNS.values()),
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "left", *("right" for _ in _COLUMNS)),
    )


def _cell(quality: Quality, key: str) -> str:
    value = getattr(quality, key)
    if key in COUNTS:
        return f"{int(value):,}"
    return "–" if math.isnan(value) else f"{100 * value:.1f}"
