"""Evaluation of label maps: IoU by class, mIoU, pixel accuracy.

As in VOC's benchmark, pixels are counted over the whole data set before dividing, and background is
a class. Void (255) in the ground truth is ignored. Void in a label counts as a miss of the true
class and as no false positive: ignoring it would reward void on wrong pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from s4m_d2.errors import DatasetError
from s4m_d2.sepl.files import AFTER, BEFORE, TRUTH, ImageFiles
from s4m_d2.sepl.rule import VOID


def confusion(truth: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels by true class and label, of C classes with background.

    truth: (H, W) uint8 of classes below C; 255 is ignored. label: likewise; 255 is a miss. Returns
    (C, C + 1) int64; rows are true classes, columns are labels, the last one void.
    """
    pairs = truth.astype(np.uint16) * np.uint16(256) + label
    counts = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)
    return counts[:num_classes, np.r_[:num_classes, VOID]]


def iou(counts: np.ndarray) -> np.ndarray:
    """(C,) float64 IoUs of a confusion matrix; nan if neither map has the class."""
    hits = counts.diagonal()
    union = counts.sum(1) + counts[:, :-1].sum(0) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def miou(counts: np.ndarray) -> float:
    """Mean IoU of the classes that occur, with background; nan if none does."""
    found = iou(counts)
    present = ~np.isnan(found)
    return float(found[present].mean()) if present.any() else math.nan


def pixel_accuracy(counts: np.ndarray) -> float:
    """Share of correct pixels among the scored ones; nan if there are none."""
    pixels = int(counts.sum())
    return int(np.trace(counts)) / pixels if pixels else math.nan


def confusions(labels: Mapping[str, np.ndarray], num_classes: int) -> list[np.ndarray]:
    """Confusion matrices of an image's label maps ``BEFORE``, if given, and ``AFTER``."""
    kinds = [kind for kind in (BEFORE, AFTER) if kind in labels]
    return [confusion(labels[TRUTH], labels[kind], num_classes) for kind in kinds]


def compare(files: ImageFiles, images: Iterable[str] | None = None) -> dict[str, Any]:
    """Score the enhanced labels and, if given, the pseudo-labels of images with all their files.

    Args:
        files: with a ground truth.
        images: names of the images; None: all with a label, enhanced or not.

    Returns:
        ``iou`` (by class), ``miou`` and ``pixel_accuracy`` of the whole set, and "images": name and
        mIoU of each image. Scores are "before", "after" and "gain", or "after" alone; nan if
        undefined. ``num_images``, ``improved``, ``worsened``: numbers of compared images;
        ``problems``: name → message of the others.
    """
    kinds, names = {BEFORE, AFTER} & {*files.by_kind}, files.class_names
    if images is None:
        images = {name for kind in kinds for name in files.by_kind[kind]}

    def count(name: str) -> list[np.ndarray] | str:
        try:
            return confusions(files.read_labels(name), len(names))
        except DatasetError as error:
            return str(error)

    images = sorted(set(images))
    totals = np.zeros((len(kinds), len(names), len(names) + 1), dtype=np.int64)
    scores: list[dict[str, Any]] = []
    problems = {}
    with ThreadPoolExecutor() as pool:
        for name, found in zip(images, pool.map(count, images), strict=True):
            if isinstance(found, str):
                problems[name] = found
            else:
                scores.append({"name": name, **_change(*map(miou, found))})
                totals += found
    gains = [score.get("gain", math.nan) for score in scores]
    changes = {"improved": sum(g > 0 for g in gains), "worsened": sum(g < 0 for g in gains)}
    by_class = zip(names, *(iou(of).tolist() for of in totals), strict=True)
    return {
        "num_images": len(scores),
        **(changes if BEFORE in kinds else {}),
        "iou": {name: _change(*values) for name, *values in by_class},
        "miou": _change(*map(miou, totals)),
        "pixel_accuracy": _change(*map(pixel_accuracy, totals)),
        "images": scores,
        "problems": problems,
    }


def _change(*values: float) -> dict[str, float]:
    """{"before", "after", "gain"} of two scores, {"after"} of one."""
    if len(values) == 1:
        return {"after": values[0]}
    before, after = values
    return {"before": before, "after": after, "gain": after - before}
