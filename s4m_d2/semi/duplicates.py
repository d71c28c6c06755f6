"""Duplicates: of several pseudo-labels on one instance only the best is kept.

Not part of the paper. Several queries of a teacher often find one instance or parts of it; prompted
with points in each part, SAM returns the same whole instance for every query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s4m_d2.structures import PseudoLabels, dense_overlaps
from s4m_d2.transfers import to_host


@torch.no_grad()
def drop_duplicates(
    labels: Sequence[PseudoLabels], iou_thresh: float, overlap_thresh: float = 1.0
) -> list[PseudoLabels]:
    """Drop labels if a better one has nearly the same mask, or contains it or is part of it.

    The better one has the higher score, times the quality if that is known. Classes are ignored, as
    an instance has only one. Of equal ones the first is kept. A label counts as a duplicate of a
    better one even if that one is a duplicate itself (Fast NMS, as in YOLACT). Synchronizes once.

    Args:
        labels: of the images of a batch, on one device.
        iou_thresh: the IoU of the masks must exceed it, in [0, 1]; or
        overlap_thresh: the share of the smaller mask that both have must exceed this.
    """
    if not labels:
        return []
    found = [
        are_duplicates(
            label.masks,
            label.scores if label.quality is None else label.scores * label.quality,
            iou_thresh,
            overlap_thresh=overlap_thresh,
        )
        for label in labels
    ]
    pairs = zip(labels, to_host(*found), strict=True)
    return [of_image[np.flatnonzero(~duplicate)] for of_image, duplicate in pairs]


def are_duplicates(
    masks: Tensor,
    scores: Tensor,
    iou_thresh: float,
    classes: Tensor | None = None,
    overlap_thresh: float = 1.0,
) -> Tensor:
    """(N,) bool: a mask of a higher score is of the same instance; see :func:`drop_duplicates`.

    Args:
        masks: (N, H, W) bool.
        scores: (N,).
        iou_thresh: the IoU must exceed it, in [0, 1]; or
        overlap_thresh: the shared part of the smaller mask this.
        classes: (N,); only masks of one class are compared. None: all.
    """
    shared = dense_overlaps(masks, masks)
    areas = shared.diagonal()
    is_same = shared > iou_thresh * (areas[:, None] + areas - shared)  # False for empty masks
    is_same |= shared > overlap_thresh * torch.minimum(areas[:, None], areas)
    if classes is not None:
        is_same &= classes[:, None] == classes
    order = torch.arange(len(scores), device=scores.device)
    is_tie = scores[:, None] == scores
    is_better = (scores[:, None] > scores) | (is_tie & (order[:, None] < order))
    return (is_same & is_better).any(dim=0)
