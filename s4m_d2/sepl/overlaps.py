"""How many pixels SAM's masks share with classes or instances: one matrix for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

BEYOND = -1  # no class


def label_overlaps(masks: np.ndarray, pseudo_label: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Pixels that each mask shares with each class of a label map.

    Args:
        masks: (N, H, W) bool.
        pseudo_label: (H, W) integers.
        classes: (K,) indices, ascending.

    Returns:
        (N, K) int64.
    """
    place = np.searchsorted(classes, pseudo_label)
    is_class = np.append(classes, BEYOND)[place] == pseudo_label
    place = np.where(is_class, place, len(classes))  # the last place: no class
    counts = [np.bincount(place[mask], minlength=len(classes) + 1) for mask in masks]
    return np.array(counts, dtype=np.int64).reshape(-1, len(classes) + 1)[:, :-1]


def rle_overlaps(
    masks: Sequence[Mapping[str, Any]], pseudo_label: np.ndarray, classes: np.ndarray
) -> np.ndarray:
    """:func:`label_overlaps` of N compressed COCO RLEs, which are not decoded.

    Args:
        masks: dicts with ``size`` [H, W] and ``counts`` as bytes or str.
    """
    if not len(masks) or not len(classes):
        return np.zeros((len(masks), len(classes)), dtype=np.int64)
    by_column = np.asfortranarray(pseudo_label)  # the order of run lengths
    segments = [mask_utils.encode((by_column == index).view(np.uint8)) for index in classes]
    # Of a crowd, COCO's IoU is the share of the first mask's area.
    shares = mask_utils.iou(list(masks), segments, [True] * len(segments))
    areas = mask_utils.area(list(masks)).astype(np.float64)
    return np.rint(shares * areas[:, None]).astype(np.int64)
