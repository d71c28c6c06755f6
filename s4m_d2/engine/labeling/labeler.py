"""Stage 2's labeling as a model, so that evaluation's tiles and predictor label whole folders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import nn

from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.structures import PseudoLabels, mask_boxes


class Labeler(nn.Module):
    """The teacher labels and SAM redraws, by the training's thresholds; in eval mode."""

    def __init__(self, labeling: PseudoLabeling) -> None:
        super().__init__()
        self.labeling = labeling
        self.eval()

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """As a Detectron2 model: samples with "image" (3, h, w), "height" and "width" or without.

        Returns:
            dicts with "instances" of (height, width): ``pred_masks`` bool, ``pred_boxes``,
            ``scores``, ``pred_classes`` and ``sam_ious`` (nan: the mask is not SAM's); none is
            empty.
        """
        _, refinement = self.labeling.label([dict(sample) for sample in batched_inputs])
        return [
            {"instances": _instances(labels, (s.get("height", h), s.get("width", w)))}
            for labels, s in zip(refinement.labels, batched_inputs, strict=True)
            for h, w in [labels.image_size]
        ]


def _instances(labels: PseudoLabels, size: tuple[int, int]) -> Instances:
    masks, ious = labels.masks, labels.sam_ious
    if labels.image_size != size:
        masks = masks.new_empty(len(labels), *size)
        for mask, small in zip(masks, labels.masks, strict=True):  # in the memory of one
            mask[:] = F.interpolate(small[None, None].float(), size, mode="bilinear")[0, 0] > 0.5
    found = Instances(
        size,
        pred_masks=masks,
        pred_boxes=Boxes(mask_boxes(masks)),
        scores=labels.scores,
        pred_classes=labels.labels,
        sam_ious=torch.full_like(labels.scores, math.nan) if ious is None else ious,
    )
    return found[masks.flatten(1).any(dim=1)]
