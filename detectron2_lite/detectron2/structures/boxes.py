"""Axis-aligned boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor

RawBoxes = list[float] | tuple[float, ...] | Tensor | np.ndarray


@unique
class BoxMode(IntEnum):
    """How four numbers describe a box; ABS is in pixels, REL (unsupported) in image sides."""

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(box: RawBoxes, from_mode: BoxMode, to_mode: BoxMode) -> RawBoxes:
        """Convert one box (list, tuple) or N boxes ((N, 4) tensor, array); same type, a copy.

        Only XYXY_ABS and XYWH_ABS convert into each other: others raise NotImplementedError,
        relative modes AssertionError.
        """
        if from_mode == to_mode:
            return box
        relative = {BoxMode.XYXY_REL, BoxMode.XYWH_REL}
        assert not relative & {from_mode, to_mode}, "Relative mode not yet supported!"
        if {from_mode, to_mode} != {BoxMode.XYXY_ABS, BoxMode.XYWH_ABS}:
            raise NotImplementedError(f"no conversion from BoxMode {from_mode!r} to {to_mode!r}")
        single = isinstance(box, (list, tuple))
        boxes = torch.tensor(box)[None] if single else torch.as_tensor(box).clone()
        assert boxes.shape[-1] == 4, f"a box has four numbers, got {boxes.shape[-1]}"
        sign = 1 if from_mode == BoxMode.XYWH_ABS else -1
        boxes[:, 2:] += sign * boxes[:, :2]
        if single:
            return type(box)(boxes.flatten().tolist())
        return boxes.numpy() if isinstance(box, np.ndarray) else boxes


class Boxes:
    """N boxes as a float32 (N, 4) tensor of (x1, y1, x2, y2) in pixels, indexed like a tensor."""

    def __init__(self, tensor: Tensor | np.ndarray | Sequence[Sequence[float]]):
        tensor = torch.as_tensor(tensor, dtype=torch.float32)
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.size(-1) == 4, tensor.size()
        self.tensor = tensor

    def to(self, device: torch.device) -> Boxes:
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def area(self) -> Tensor:
        """(N,) areas."""
        return (self.tensor[:, 2:] - self.tensor[:, :2]).prod(dim=1)

    def clip(self, box_size: tuple[int, int]) -> None:
        """Clip in place to an image of size (height, width)."""
        assert torch.isfinite(self.tensor).all(), "Box tensor contains infinite or NaN!"
        height, width = box_size
        limit = self.tensor.new_tensor([width, height, width, height])
        self.tensor = self.tensor.clamp(min=torch.zeros_like(limit), max=limit)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """(N,) bool: both sides are longer than `threshold`."""
        return (self.tensor[:, 2:] - self.tensor[:, :2] > threshold).all(dim=1)

    def __getitem__(self, item: int | slice | Tensor) -> Boxes:
        boxes = self.tensor[item][None] if isinstance(item, int) else self.tensor[item]
        assert boxes.dim() == 2, f"Indexing on Boxes with {item} failed to return a matrix!"
        return Boxes(boxes)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    @classmethod
    def cat(cls, boxes_list: Sequence[Boxes]) -> Boxes:
        """Join lists of boxes; the result shares no memory with them."""
        assert all(isinstance(boxes, Boxes) for boxes in boxes_list)
        return cls(torch.cat([b.tensor for b in boxes_list]) if boxes_list else torch.empty(0))
