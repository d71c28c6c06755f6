"""Quality of pseudo-labels' masks, apart from their class probability. Not part of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import teacher_masks
from s4m_d2.structures import PseudoLabels, mask_areas
from s4m_d2.transfers import to_host


@torch.no_grad()
def mask_quality(selection: Selection, refined: PseudoLabels, logit_thresh: float = 0.0) -> Tensor:
    """(N,) quality in [0, 1]: certainty * agreement * SAM's predicted IoU.

    The certainty is the mean of the teacher's mask probabilities inside its mask (the mask score of
    Mask2Former), the agreement the IoU of the teacher's and the refined mask at image size. What
    does not exist counts as 1: without SAM, or where the teacher's mask was kept, the quality is
    the certainty alone.

    Args:
        selection: the teacher's N masks, each with a pixel.
        refined: the same instances after refinement.
        logit_thresh: of the teacher's masks at image size.
    """
    inside = selection.labels.masks
    certainty = (selection.mask_logits.sigmoid() * inside).sum((1, 2)) / mask_areas(inside)
    teachers = teacher_masks(selection, refined.image_size, logit_thresh)
    either = mask_areas(teachers | refined.masks).clamp(min=1)
    quality = certainty * mask_areas(teachers & refined.masks) / either
    if refined.sam_ious is None:
        return quality
    return quality * refined.sam_ious.nan_to_num(nan=1.0).clamp(0.0, 1.0)


def drop_low_quality(labels: Sequence[PseudoLabels], thresh: float) -> list[PseudoLabels]:
    """Drop the labels whose quality, which is known, is below ``thresh``. Synchronizes once."""
    known = [of_image.quality for of_image in labels if of_image.quality is not None]
    pairs = zip(labels, to_host(*known), strict=True)
    return [of_image[np.flatnonzero(quality >= thresh)] for of_image, quality in pairs]
