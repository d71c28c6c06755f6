"""Filters of pseudo-labels that are not part of the paper: score thresholds by class, as in
FlexMatch and FreeMatch, the quality of masks, and duplicates: several queries often find parts of
one instance, and prompted with points in each part, SAM returns the whole instance each time.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor

from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.structures import PseudoLabels, dense_overlaps, mask_areas
from s4m_d2.transfers import to_host

FLOOR = 0.5  # the lowest threshold of a class, as a share of SCORE_THRESH
BATCHES = 100  # over about so many the average runs; of the first ones it is the mean


class ClassThresholds:
    """Lowers the threshold of classes of which the teacher is less sure than of its surest one.

    A class' confidence is the mean score of the queries that prefer it, with scores above the
    lowest threshold, averaged exponentially over the batches that have such queries. Its threshold
    is ``score_thresh * confidence / largest confidence``, at least ``FLOOR * score_thresh``; before
    the class is seen it is ``score_thresh``.

    Args:
        score_thresh: S4M.PSEUDO_LABEL.SCORE_THRESH, which no threshold exceeds.
        num_classes: K.
    """

    def __init__(self, score_thresh: float, num_classes: int) -> None:
        self.score_thresh = score_thresh
        self.confidence = torch.zeros(num_classes)
        self.batches = torch.zeros(num_classes)  # in which each class was seen

    def __call__(self) -> Tensor:
        """(K,) float32 thresholds, on the device of the last batch."""
        relative = self.confidence / self.confidence.amax()
        relative = relative.where(self.batches > 0, 1.0).clamp(min=FLOOR)
        return self.score_thresh * relative

    @torch.no_grad()
    def observe(self, pred_logits: Sequence[Tensor]) -> None:
        """Follow a batch's (Q, K + 1) class logits, in all processes together; no synchronization
        with the device."""
        num_classes = len(self.confidence)
        scores, classes = torch.cat([*pred_logits]).float().softmax(dim=-1).max(dim=-1)
        counted = scores > FLOOR * self.score_thresh  # False for NaN
        chosen = F.one_hot(classes, num_classes + 1)[:, :num_classes] * counted[:, None]
        of_classes = scores.where(counted, 0.0)[:, None] * chosen
        totals = torch.stack([of_classes.sum(0), chosen.sum(0).float()])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(totals)
        sums, counts = totals
        is_seen = counts > 0
        confidence = self.confidence.to(sums.device)
        self.batches = self.batches.to(sums.device) + is_seen
        change = (sums / counts - confidence) / self.batches.clamp(max=BATCHES)
        self.confidence = confidence + change.where(is_seen, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"confidence": self.confidence, "batches": self.batches}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.confidence, self.batches = state_dict["confidence"], state_dict["batches"]


@torch.no_grad()
def mask_quality(selection: Selection, refined: PseudoLabels) -> Tensor:
    """(N,) quality in [0, 1]: certainty * agreement * SAM's predicted IoU.

    The certainty is the mean of the teacher's mask probabilities inside its mask (the mask score of
    Mask2Former), the agreement the IoU of the teacher's and the refined mask at image size. Without
    SAM, or where the teacher's mask was kept, the quality is the certainty alone.

    Args:
        selection: the teacher's N masks.
        refined: the same instances after refinement.
    """
    inside = selection.labels.masks
    certainty = (selection.mask_logits.sigmoid() * inside).sum((1, 2)) / mask_areas(inside)
    teachers = selection.masks_at(refined.image_size)
    either = mask_areas(teachers | refined.masks).clamp(min=1)
    quality = certainty * mask_areas(teachers & refined.masks) / either
    if refined.sam_ious is None:
        return quality
    return quality * refined.sam_ious.nan_to_num(nan=1.0).clamp(0.0, 1.0)


def drop_low_quality(labels: Sequence[PseudoLabels], thresh: float) -> list[PseudoLabels]:
    """Drop the labels whose quality, which is known, is below ``thresh``. Synchronizes once."""
    return _keep(labels, [label.quality >= thresh for label in labels if label.quality is not None])


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
    values = [x.scores if x.quality is None else x.scores * x.quality for x in labels]
    kept = [
        ~are_duplicates(x.masks, value, iou_thresh, overlap_thresh=overlap_thresh)
        for x, value in zip(labels, values, strict=True)
    ]
    return _keep(labels, kept)


def _keep(labels: Sequence[PseudoLabels], flags: Sequence[Tensor]) -> list[PseudoLabels]:
    pairs = zip(labels, to_host(*flags), strict=True)
    return [of_image[np.flatnonzero(kept)] for of_image, kept in pairs]


def are_duplicates(
    masks: Tensor,
    scores: Tensor,
    iou_thresh: float,
    classes: Tensor | None = None,
    overlap_thresh: float = 1.0,
) -> Tensor:
    """(N,) bool: a mask of a higher score is of the same instance; see :func:`drop_duplicates`.

    masks: (N, H, W) bool. scores: (N,). classes: (N,); only masks of one class are compared.
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
