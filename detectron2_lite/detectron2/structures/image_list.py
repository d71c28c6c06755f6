"""Images of different sizes in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ImageList:
    """A padded batch (N, ..., H, W) and the size (h, w) of each image, its top left part."""

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]):
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Image `idx` without its padding, (..., h, w)."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> ImageList:
        """Pad (..., H_i, W_i) tensors at the right and the bottom to a common size.

        size_divisibility: the common sides become multiples of it (0 and 1 ask for nothing).
        padding_constraints: "size_divisibility" goes before the argument; "square_size", if
            positive, is the common side of all.
        """
        constraints = padding_constraints or {}
        image_sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        sides = [max(side) for side in zip(*image_sizes, strict=True)]
        if constraints.get("square_size", 0) > 0:
            sides = [constraints["square_size"]] * 2
        stride = max(constraints.get("size_divisibility", size_divisibility), 1)
        sides = [-(-side // stride) * stride for side in sides]
        batch = tensors[0].new_full((len(tensors), *tensors[0].shape[:-2], *sides), pad_value)
        for padded, image in zip(batch, tensors, strict=True):
            assert image.shape[:-2] == padded.shape[:-2], image.shape
            padded[..., : image.shape[-2], : image.shape[-1]].copy_(image)
        return ImageList(batch, image_sizes)
