"""Several pseudo-labels on one instance: all but the most certain count as not there.

Not part of the paper. A teacher's queries often show parts of one instance, and from clicks in each
part SAM draws the same whole instance, once for every query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s4m_d2.structures import PseudoLabels, dense_overlaps


@torch.no_grad()
def mark_duplicates(
    labels: Sequence[PseudoLabels], iou_thresh: float
) -> tuple[list[PseudoLabels], Tensor]:
    """Set ``valid`` to False where another valid label has nearly the same mask and a higher score.

    Classes do not matter: an instance has one. Of equal scores the first stays. A label counts as
    a duplicate of a better one even where that one is a duplicate itself (Fast NMS, as in YOLACT),
    so that nothing waits for the device.

    Args:
        labels: of the images of a batch, on one device.
        iou_thresh: the IoU of the masks must exceed it, in [0, 1].

    Returns:
        The labels, and how many duplicates there were among the valid ones, 0-dim int64.
    """
    marked, counts = [], []
    for of_image in labels:
        valid = of_image.valid
        if valid is None:
            valid = torch.ones(len(of_image), dtype=torch.bool, device=of_image.masks.device)
        duplicate = _duplicates(of_image, valid, iou_thresh)
        marked.append(replace(of_image, valid=valid & ~duplicate))
        counts.append(duplicate.sum())
    return marked, torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64)


def _duplicates(labels: PseudoLabels, valid: Tensor, iou_thresh: float) -> Tensor:
    """(N,) bool: ``valid``, and another one that is valid is better and nearly the same."""
    scores = labels.scores
    shared = dense_overlaps(labels.masks, labels.masks)
    areas = shared.diagonal()
    is_same = shared > iou_thresh * (areas[:, None] + areas - shared)  # False for empty masks
    order = torch.arange(len(labels), device=scores.device)
    is_tie = scores[:, None] == scores
    is_better = (scores[:, None] > scores) | (is_tie & (order[:, None] < order))
    return (is_same & is_better & valid[:, None]).any(dim=0) & valid
