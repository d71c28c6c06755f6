"""Which labeled images to correct first: where labels are uncertain or unusual, and images differ.

Not part of the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

SIGNALS = ("class", "mask", "number", "rare")
DIVERSITY = 0.5  # of the largest distance between images, in ranks of the signals


def review_signals(rows: Sequence[dict]) -> dict[str, np.ndarray]:
    """Signs that labels of an image are wrong, higher where they more probably are.

    Args:
        rows: of labeled images, see :mod:`s4m_d2.formats`.

    Returns:
        (N,) each, by name. class: mean of 1 - score of the image's instances. mask: the same of
        sam_iou; 1 where SAM drew no mask. Without instances, both are 1: something may be missed.
        number: how much the number of instances differs from the median, abs(log(ratio)). rare:
        -log of the frequency of the image's rarest class.
    """
    instances = [row["instances"] for row in rows]
    count = np.array([len(of_image) for of_image in instances])
    classes = Counter(i["class"] for of_image in instances for i in of_image)
    frequency = {index: number / max(count.sum(), 1) for index, number in classes.items()}

    def doubt(key: str) -> list[float]:
        of_images = ([1 - i.get(key, 0.0) for i in of_image] for of_image in instances)
        return [float(np.mean(values)) if values else 1.0 for values in of_images]

    rarest = (min((frequency[i["class"]] for i in x), default=1.0) for x in instances)
    return {
        "class": np.array(doubt("score")),
        "mask": np.array(doubt("sam_iou")),
        "number": np.abs(np.log((count + 1) / (np.median(count) + 1))),
        "rare": np.log(1 / np.fromiter(rarest, dtype=float)),
    }


def review_order(
    signals: dict[str, np.ndarray], by: Sequence[str], features: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The images in the order in which to look at them, and their values.

    The value is the mean of an image's ranks in the signals ``by``, in (0, 1]. Each of the first
    ``count`` images is the one with the highest value plus distance to those before it; the others
    follow by value.

    Args:
        features: (N, D), in which similar images are near each other.

    Returns:
        (N,) positions, and (N,) values in the order of the images.
    """
    value = np.mean([rankdata(signals[name]) / len(features) for name in by], axis=0)
    scale = np.linalg.norm(features - features.mean(axis=0), axis=1).max(initial=0.0) or 1.0
    distance = np.ones(len(features))
    left = np.ones(len(features), dtype=bool)
    first = []
    for _ in range(min(count, len(features))):
        chosen = int(np.where(left, value + DIVERSITY * distance, -1.0).argmax())
        first.append(chosen)
        left[chosen] = False
        to_chosen = np.linalg.norm(features - features[chosen], axis=1) / (2 * scale)
        distance = np.minimum(distance, to_chosen)
    others = np.argsort(-value, kind="stable")
    return np.array([*first, *others[left[others]]], dtype=int), value
