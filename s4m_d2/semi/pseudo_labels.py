"""Which of the teacher's predictions become pseudo-labels (paper, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s4m_d2.errors import InputError
from s4m_d2.structures import PseudoLabels


@dataclass(frozen=True)
class Selection:
    """The kept predictions of one image, at the prediction's resolution, without padding.

    Attributes:
        labels: N pseudo-labels with (N, h', w') masks.
        mask_logits: (N, h', w') float32 logits of these masks.
        content_size: (h', w') extent of the image content in the masks' pixels; fractional where
            the content ends inside the last row or column.
        stats: counts of ``queries``, ``dropped_no_object``, ``dropped_score``, ``dropped_area``,
            ``dropped_non_finite`` (each query counts for the first rule that drops it) and
            ``kept``.
    """

    labels: PseudoLabels
    mask_logits: Tensor
    content_size: tuple[float, float]
    stats: dict[str, int]


@torch.no_grad()
def select_pseudo_labels(
    pred_logits: Tensor,
    pred_masks: Tensor,
    *,
    content_size: tuple[float, float],
    score_thresh: float,
    min_area: float,
    mask_thresh: float = 0.5,
) -> Selection:
    """Keep a query if its arg-max class is an object, its score and its soft area are high enough.

    A query whose class probabilities are nan, or which passes so far but has a mask logit that is
    not finite, is dropped as well.

    Args:
        pred_logits: (Q, K + 1) class logits; the last class is no-object.
        pred_masks: (Q, h, w) mask logits of the padded image (content at the top left).
        content_size: (h', w') of the content in prediction pixels; padding is not looked at. It may
            be fractional, H_content * h / H_padded; the masks have ceil(h') x ceil(w') pixels.
        score_thresh: the class probability must exceed it.
        min_area: the sum of the mask's probabilities must exceed it, px of the prediction.
        mask_thresh: a pixel belongs to the mask if its probability exceeds it.

    Raises:
        InputError: if shapes disagree or the content does not fit into the prediction.
    """
    height, width = (math.ceil(side) for side in content_size)
    _check_shapes(pred_logits, pred_masks, (height, width))
    no_object = pred_logits.shape[1] - 1
    scores, classes = pred_logits.float().softmax(dim=-1).max(dim=-1)
    is_finite = scores.isfinite()
    is_object = is_finite & (classes != no_object)
    confident = (is_object & (scores > score_thresh)).nonzero().flatten()

    mask_logits = pred_masks[confident, :height, :width].float()
    usable = mask_logits.isfinite().flatten(1).all(dim=1)
    mask_logits, queries = mask_logits[usable], confident[usable]
    probabilities = mask_logits.sigmoid()
    large = probabilities.sum(dim=(1, 2)) > min_area
    labels = PseudoLabels(
        classes[queries][large], probabilities[large] > mask_thresh, scores[queries][large]
    )
    passed = (len(scores), is_finite.sum(), is_object.sum(), len(confident), len(queries))
    return Selection(
        labels=labels,
        mask_logits=mask_logits[large],
        content_size=(float(content_size[0]), float(content_size[1])),
        stats=_statistics(*map(int, passed), kept=len(labels)),
    )


def _statistics(
    queries: int, finite: int, objects: int, confident: int, usable: int, kept: int
) -> dict[str, int]:
    """How many queries each rule dropped, from how many were left after each."""
    return {
        "queries": queries,
        "dropped_no_object": finite - objects,
        "dropped_score": objects - confident,
        "dropped_area": usable - kept,
        "dropped_non_finite": queries - finite + confident - usable,
        "kept": kept,
    }


def _check_shapes(pred_logits: Tensor, pred_masks: Tensor, content: tuple[int, int]) -> None:
    if pred_logits.ndim != 2 or pred_masks.ndim != 3 or len(pred_logits) != len(pred_masks):
        raise InputError(
            "predictions of one image are pred_logits (Q, K+1) and pred_masks (Q, h, w), "
            f"got {tuple(pred_logits.shape)} and {tuple(pred_masks.shape)}"
        )
    height, width = pred_masks.shape[1:]
    if not (0 < content[0] <= height and 0 < content[1] <= width):
        raise InputError(
            f"content_size {content} must be positive and fit into masks of {height} x {width}; "
            "it is counted in pixels of the prediction, not of the image"
        )
