"""Several pseudo-labels on one instance: all but the most certain are dropped.

Not part of the paper. A teacher's queries often show parts of one instance, and from clicks in each
part SAM draws the same whole instance, once for every query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s4m_d2.structures import PseudoLabels, dense_overlaps
from s4m_d2.transfers import to_host


@torch.no_grad()
def drop_duplicates(labels: Sequence[PseudoLabels], iou_thresh: float) -> list[PseudoLabels]:
    """Labels without those of which another has nearly the same mask and a higher score.

    Classes do not matter: an instance has one. Of equal scores the first stays. A label counts as
    a duplicate of a better one even where that one is a duplicate itself (Fast NMS, as in YOLACT).
    Synchronizes once.

    Args:
        labels: of the images of a batch, on one device.
        iou_thresh: the IoU of the masks must exceed it, in [0, 1].
    """
    if not labels:
        return []
    duplicates = to_host(*(_duplicates(of_image, iou_thresh) for of_image in labels))
    pairs = zip(labels, duplicates, strict=True)
    return [of_image[np.flatnonzero(~duplicate)] for of_image, duplicate in pairs]


def _duplicates(labels: PseudoLabels, iou_thresh: float) -> Tensor:
    """(N,) bool: another one is better and nearly the same."""
    scores = labels.scores
    shared = dense_overlaps(labels.masks, labels.masks)
    areas = shared.diagonal()
    is_same = shared > iou_thresh * (areas[:, None] + areas - shared)  # False for empty masks
    order = torch.arange(len(labels), device=scores.device)
    is_tie = scores[:, None] == scores
    is_better = (scores[:, None] > scores) | (is_tie & (order[:, None] < order))
    return (is_same & is_better).any(dim=0)
