"""Pseudo-label quality as its definition reads, pixel by pixel and pair by pair."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np


def iou(first: np.ndarray, second: np.ndarray) -> Fraction:
    union = int((first | second).sum())
    return Fraction(int((first & second).sum()), union) if union else Fraction(0)


def share(mask: np.ndarray, region: np.ndarray) -> Fraction:
    """Of the mask's own pixels."""
    return Fraction(int((mask & region).sum()), max(1, int(mask.sum())))


def size_of(mask: np.ndarray, limits: tuple[float, float], pixel_area: float) -> str:
    area = mask.sum() * pixel_area
    return "small" if area < limits[0] else "medium" if area < limits[1] else "large"


def matches(labels, truths) -> list[tuple[int, int]]:
    """The best pair, then the best of those whose label and truth are both left, and so on.

    Args:
        labels, truths: (class id, mask, score) and (class id, mask).
    """
    pairs = [
        (-iou(mine[1], theirs[1]), -mine[2], mine[0] != theirs[0], mine[0], theirs[0], i, j)
        for (i, mine), (j, theirs) in itertools.product(enumerate(labels), enumerate(truths))
        if iou(mine[1], theirs[1]) > Fraction(1, 2)
    ]
    chosen: list[tuple[int, int]] = []
    while pairs:
        *_, i, j = min(pairs)
        chosen.append((i, j))
        pairs = [pair for pair in pairs if pair[-2] != i and pair[-1] != j]
    return chosen


def counts(images, limits, pixel_area=1.0) -> dict[tuple[str, object], Counter]:
    """Counts of the whole, ("all", None), of classes, ("class", id), and of ("size", name).

    Args:
        images: of each, (class id, mask, score) of the labels and (class id, mask, is crowd) of the
            truth.
    """
    result: dict[tuple[str, object], Counter] = {}

    def count(what, class_id, mask, value=1):
        size = size_of(mask, limits, pixel_area)
        for group in (("all", None), ("class", class_id), ("size", size)):
            result.setdefault(group, Counter())[what] += value

    for labels, instances in images:
        truths = [(class_id, mask) for class_id, mask, is_crowd in instances if not is_crowd]
        crowds = [mask for _, mask, is_crowd in instances if is_crowd]
        pairs = dict(matches(labels, truths))
        for truth in truths:
            count("instances", *truth)
        for i, j in pairs.items():
            value = iou(labels[i][1], truths[j][1])
            for prefix in ("found", "correct")[: 1 + (labels[i][0] == truths[j][0])]:
                count(prefix, *truths[j])
                count(f"iou_{prefix}", *truths[j], value)
        for i, (class_id, mask, _) in enumerate(labels):
            if i in pairs:
                mask = truths[pairs[i]][1]
                count("matched", class_id, mask)
            elif any(share(mask, crowd) > Fraction(1, 2) for crowd in crowds):
                count("in_crowds", class_id, mask)
                continue
            elif any(iou(mask, truth) > Fraction(1, 2) for _, truth in truths):
                count("duplicates", class_id, mask)
            count("pseudo_labels", class_id, mask)
    return result
