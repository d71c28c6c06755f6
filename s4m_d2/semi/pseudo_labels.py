"""Selection of the teacher's predictions that become pseudo-labels (paper, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s4m_d2.structures import PseudoLabels, mask_areas
from s4m_d2.transfers import to_device, to_host


@dataclass(frozen=True)
class Selection:
    """The kept predictions of one image, at the prediction's resolution, without padding.

    Attributes:
        labels: N pseudo-labels with (N, h', w') masks, each with a pixel.
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
    pred_logits: Sequence[Tensor],
    pred_masks: Sequence[Tensor],
    *,
    content_sizes: Sequence[tuple[float, float]],
    score_thresh: float | Tensor,
    min_area: float,
    mask_thresh: float = 0.5,
) -> list[Selection]:
    """Keep a query if its arg-max class is an object, its score and its soft area are high enough.

    Queries with NaN class probabilities, with a mask logit that is not finite, or whose mask has no
    pixel are dropped too. Synchronizes once.

    Args:
        pred_logits: of each image (Q, K + 1) class logits; the last class is no-object. Q may
            differ.
        pred_masks: of each image (Q, h, w) mask logits with padding (content at the top left).
        content_sizes: of each image (h', w') of the content in prediction pixels; padding is
            ignored. They may be fractional, H_content * h / H_padded; the masks have ceil(h') x
            ceil(w') pixels.
        score_thresh: the class probability must exceed it; or (K,), one for each class.
        min_area: the sum of the mask's probabilities must exceed it, px of the prediction.
        mask_thresh: a pixel belongs to the mask if its probability exceeds it.
    """
    verdicts = []
    for logits, masks, size in zip(pred_logits, pred_masks, content_sizes, strict=True):
        scores, classes = logits.float().softmax(dim=-1).max(dim=-1)
        is_finite = scores.isfinite()
        is_object = is_finite & (classes != logits.shape[1] - 1)
        thresh = score_thresh
        if isinstance(thresh, Tensor):
            thresh = thresh[classes.clamp(max=len(thresh) - 1)]
        is_confident = is_object & (scores > thresh)
        usable, large, areas = _measure(_content(masks, size), min_area, mask_thresh)
        usable &= is_confident
        passed = [is_finite, is_object, is_confident, usable, usable & large & (areas > 0)]
        verdicts.append(
            (scores, classes, torch.stack([flags.long() for flags in passed] + [areas]))
        )
    on_host = to_host(*(verdict for *_, verdict in verdicts)) if verdicts else []
    selections = []
    for (scores, classes, _), (*passed, areas), masks, size in zip(
        verdicts, on_host, pred_masks, content_sizes, strict=True
    ):
        rows = np.flatnonzero(passed[-1])
        kept = to_device(rows, masks.device)
        logits = _content(masks[kept], size)
        is_inside = logits.sigmoid() > mask_thresh
        selections.append(
            Selection(
                PseudoLabels(classes[kept], is_inside, scores[kept], areas[rows]),
                mask_logits=logits,
                content_size=(float(size[0]), float(size[1])),
                stats=_statistics(len(areas), *(int(flags.sum()) for flags in passed)),
            )
        )
    return selections


def _content(masks: Tensor, content_size: tuple[float, float]) -> Tensor:
    """The pixels of a prediction that hold content."""
    return masks[:, : math.ceil(content_size[0]), : math.ceil(content_size[1])].float()


def _measure(mask_logits: Tensor, min_area: float, mask_thresh: float) -> tuple[Tensor, ...]:
    """(N,) flags "finite" and "large enough", and (N,) areas in pixels."""
    dims = (1, 2)
    usable = mask_logits.amax(dim=dims).isfinite() & mask_logits.amin(dim=dims).isfinite()
    probabilities = mask_logits.sigmoid()
    large = probabilities.sum(dim=dims) > min_area
    return usable, large, mask_areas(probabilities > mask_thresh)


def _statistics(
    queries: int, finite: int, objects: int, confident: int, usable: int, kept: int
) -> dict[str, int]:
    """Number of queries dropped by each rule, from the numbers left after each."""
    return {
        "queries": queries,
        "dropped_no_object": finite - objects,
        "dropped_score": objects - confident,
        "dropped_area": usable - kept,
        "dropped_non_finite": queries - finite + confident - usable,
        "kept": kept,
    }
