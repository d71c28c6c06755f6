"""Pseudo-labels (what the teacher says about an unlabeled image) and a sample's generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s4m_d2.errors import InputError


@dataclass(frozen=True)
class PseudoLabels:
    """Instances that a teacher found on one image.

    Attributes:
        labels: (N,) int64, contiguous class ids.
        masks: (N, H, W) bool, in the frame of the image or of a prediction (the producer says).
        scores: (N,) float, class probabilities in [0, 1].

    Raises:
        InputError: if the lengths, shapes or dtypes disagree.
    """

    labels: Tensor
    masks: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != torch.bool:
            raise InputError(
                f"masks must be (N, H, W) bool, got {tuple(self.masks.shape)} {self.masks.dtype}"
            )
        if self.labels.dtype != torch.int64 or not self.scores.is_floating_point():
            raise InputError(
                "labels must be int64 and scores floating point, "
                f"got {self.labels.dtype} and {self.scores.dtype}"
            )
        count = (len(self.masks),)
        if tuple(self.labels.shape) != count or tuple(self.scores.shape) != count:
            raise InputError(
                f"{count[0]} masks need as many labels and scores, "
                f"got {tuple(self.labels.shape)} and {tuple(self.scores.shape)}"
            )

    @classmethod
    def empty(cls, image_size: tuple[int, int], device: torch.device | str = "cpu") -> PseudoLabels:
        """No instances, on an image of ``image_size`` (H, W)."""
        return cls(
            labels=torch.zeros(0, dtype=torch.int64, device=device),
            masks=torch.zeros((0, *image_size), dtype=torch.bool, device=device),
            scores=torch.zeros(0, device=device),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> PseudoLabels:
        """Keep the instances that ``index`` (a slice, bool mask or index tensor) names."""
        return PseudoLabels(self.labels[index], self.masks[index], self.scores[index])

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the masks' frame."""
        return self.masks.shape[1], self.masks.shape[2]

    def with_masks(self, masks: Tensor) -> PseudoLabels:
        """The same labels and scores with other masks, (N, H', W') bool."""
        return PseudoLabels(self.labels, masks, self.scores)

    def to_instances(self):
        """As ``detectron2.structures.Instances`` with gt_classes, gt_masks and gt_boxes."""
        from detectron2.structures import BitMasks, Instances

        masks = BitMasks(self.masks)
        return Instances(
            self.image_size,
            gt_classes=self.labels,
            gt_masks=masks,
            gt_boxes=masks.get_bounding_boxes().to(self.labels.device),
        )


def sample_generators(
    batched_inputs: Sequence[Mapping[str, Any]], purpose: str, device: torch.device | str
) -> list[torch.Generator] | None:
    """One generator on ``device`` a sample, from ``sample["seeds"][purpose]``.

    None, which stands for PyTorch's default generator, when a loader without seeds made the batch.
    """
    if not all("seeds" in sample for sample in batched_inputs):
        return None
    return [
        torch.Generator(device=device).manual_seed(sample["seeds"][purpose])
        for sample in batched_inputs
    ]
