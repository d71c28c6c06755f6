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
        relative = (BoxMode.XYXY_REL, BoxMode.XYWH_REL)
        assert from_mode not in relative and to_mode not in relative, (
            "Relative mode not yet supported!"
        )
        single = isinstance(box, (list, tuple))
        if single:
            assert len(box) == 4, f"a single box has four numbers, got {len(box)}"
            boxes = torch.tensor(box)[None]
        else:
            boxes = torch.as_tensor(box).clone()
        if (from_mode, to_mode) == (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            boxes[:, 2:] += boxes[:, :2]
        elif (from_mode, to_mode) == (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            boxes[:, 2:] -= boxes[:, :2]
        else:
            raise NotImplementedError(
                f"Conversion from BoxMode {from_mode!r} to {to_mode!r} is not supported"
            )
        if single:
            return type(box)(boxes.flatten().tolist())
        return boxes.numpy() if isinstance(box, np.ndarray) else boxes


class Boxes:
    """N boxes as a float32 (N, 4) tensor of (x1, y1, x2, y2) in pixels, indexed like a tensor."""

    def __init__(self, tensor: Tensor | np.ndarray | Sequence[Sequence[float]]):
        if isinstance(tensor, Tensor):
            tensor = tensor.to(torch.float32)
        else:
            tensor = torch.as_tensor(tensor, dtype=torch.float32, device=torch.device("cpu"))
        if tensor.numel() == 0:
            tensor = tensor.reshape(-1, 4)
        assert tensor.dim() == 2 and tensor.size(-1) == 4, tensor.size()
        self.tensor = tensor

    def clone(self) -> Boxes:
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> Boxes:
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def _sides(self) -> tuple[Tensor, Tensor]:
        return (self.tensor[:, 2:] - self.tensor[:, :2]).unbind(dim=1)

    def area(self) -> Tensor:
        """(N,) areas."""
        width, height = self._sides()
        return width * height

    def clip(self, box_size: tuple[int, int]) -> None:
        """Clip in place to an image of size (height, width)."""
        assert torch.isfinite(self.tensor).all(), "Box tensor contains infinite or NaN!"
        height, width = box_size
        limit = self.tensor.new_tensor([width, height, width, height])
        self.tensor = self.tensor.clamp(min=torch.zeros_like(limit), max=limit)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """(N,) bool: both sides are longer than `threshold`."""
        width, height = self._sides()
        return (width > threshold) & (height > threshold)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """(N,) bool: no side lies beyond an image (height, width) by `boundary_threshold`."""
        height, width = box_size
        limit = self.tensor.new_tensor([width, height]) + boundary_threshold
        starts, ends = self.tensor[:, :2], self.tensor[:, 2:]
        return (starts >= -boundary_threshold).all(dim=1) & (ends < limit).all(dim=1)

    def get_centers(self) -> Tensor:
        """(N, 2) centers (x, y)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply the coordinates in place."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    def __getitem__(self, item: int | slice | Tensor) -> Boxes:
        if isinstance(item, int):
            return Boxes(self.tensor[item].view(1, -1))
        boxes = self.tensor[item]
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
        assert isinstance(boxes_list, (list, tuple))
        if not boxes_list:
            return cls(torch.empty(0))
        assert all(isinstance(boxes, Boxes) for boxes in boxes_list)
        return cls(torch.cat([boxes.tensor for boxes in boxes_list], dim=0))


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """(N, M) areas of intersection."""
    first, second = boxes1.tensor[:, None], boxes2.tensor
    sides = torch.min(first[..., 2:], second[:, 2:]) - torch.max(first[..., :2], second[:, :2])
    return sides.clamp_(min=0).prod(dim=2)


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """(N, M) intersections over unions; 0 where nothing intersects."""
    intersection = pairwise_intersection(boxes1, boxes2)
    union = boxes1.area()[:, None] + boxes2.area() - intersection
    return torch.where(intersection > 0, intersection / union, intersection.new_zeros(()))
