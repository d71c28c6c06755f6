"""Instance masks as bitmaps and as polygons."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from torch import Tensor

from .boxes import Boxes

_MIN_COORDINATES = 6  # a polygon has at least three points


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterize the union of polygons [x0, y0, x1, y1, ...] to a (height, width) bool mask."""
    if len(polygons) == 0:  # which pycocotools refuses
        return np.zeros((height, width), dtype=bool)
    rle = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    return mask_util.decode(rle).astype(bool)


class BitMasks:
    """N masks as a (N, H, W) bool tensor, indexed like a tensor."""

    def __init__(self, tensor: Tensor | np.ndarray):
        tensor = torch.as_tensor(tensor, dtype=torch.bool)
        assert tensor.dim() == 3, tensor.size()
        self.image_size = tensor.shape[1:]
        self.tensor = tensor

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        return BitMasks(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __getitem__(self, item: int | slice | Tensor) -> BitMasks:
        masks = self.tensor[item][None] if isinstance(item, int) else self.tensor[item]
        assert masks.dim() == 3, f"indexing BitMasks with {item} gives the shape {masks.shape}"
        return BitMasks(masks)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)})"

    def nonempty(self) -> Tensor:
        """(N,) bool: the mask has a pixel."""
        return self.tensor.flatten(1).any(dim=1)

    @staticmethod
    def from_polygon_masks(
        polygon_masks: PolygonMasks | list[list[np.ndarray]], height: int, width: int
    ) -> BitMasks:
        """Rasterize the polygons of each instance."""
        masks = torch.empty(len(polygon_masks), height, width, dtype=torch.bool)
        for mask, polygons in zip(masks, polygon_masks, strict=True):
            mask.copy_(torch.from_numpy(polygons_to_bitmask(polygons, height, width)))
        return BitMasks(masks)

    def get_bounding_boxes(self) -> Boxes:
        """Tight boxes on the CPU, the last pixel included; zeros for an empty mask."""
        boxes = torch.zeros(len(self), 4)
        columns, rows = self.tensor.any(dim=1).cpu(), self.tensor.any(dim=2).cpu()
        for i in self.nonempty().nonzero()[:, 0].tolist():
            x, y = columns[i].nonzero(), rows[i].nonzero()
            boxes[i] = torch.cat((x[0], y[0], x[-1] + 1, y[-1] + 1))
        return Boxes(boxes)

    @staticmethod
    def cat(bitmasks_list: Sequence[BitMasks]) -> BitMasks:
        """Join masks of images of one size."""
        return BitMasks(torch.cat([masks.tensor for masks in bitmasks_list]))


class PolygonMasks:
    """N masks, each a list of polygons: float64 vectors [x0, y0, x1, y1, ...], on the CPU."""

    def __init__(self, polygons: list[list[Tensor | np.ndarray]]):
        """Raises ValueError unless given lists of lists of polygons of at least three points."""
        if not isinstance(polygons, list):
            raise ValueError(f"PolygonMasks takes a list of list of polygons, got {type(polygons)}")
        self.polygons = [_check_polygons(instance) for instance in polygons]

    def to(self, *args: Any, **kwargs: Any) -> PolygonMasks:
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """Tight boxes around each instance's polygons."""
        boxes = torch.zeros(len(self), 4)
        for box, polygons in zip(boxes, self.polygons, strict=True):
            points = np.concatenate([np.zeros(0), *polygons]).reshape(-1, 2)
            box[:2] = torch.as_tensor(points.min(axis=0, initial=np.inf))
            box[2:] = torch.as_tensor(points.max(axis=0, initial=0.0))
        return Boxes(boxes)

    def nonempty(self) -> Tensor:
        """(N,) bool: the instance has a polygon."""
        return torch.tensor([len(polygons) > 0 for polygons in self.polygons], dtype=torch.bool)

    def __getitem__(self, item: int | slice | list[int] | Tensor) -> PolygonMasks:
        if isinstance(item, slice):
            return PolygonMasks(self.polygons[item])
        if isinstance(item, Tensor):
            item = (item.nonzero().squeeze(1) if item.dtype == torch.bool else item).tolist()
        indices = [item] if isinstance(item, int) else item
        return PolygonMasks([self.polygons[i] for i in indices])

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        return iter(self.polygons)

    def __len__(self) -> int:
        return len(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"

    @staticmethod
    def cat(polymasks_list: Sequence[PolygonMasks]) -> PolygonMasks:
        """Join the instances of several objects."""
        return PolygonMasks(list(itertools.chain.from_iterable(polymasks_list)))


def _check_polygons(polygons: list[Tensor | np.ndarray]) -> list[np.ndarray]:
    """Bring one instance's polygons to float64 arrays, or raise ValueError."""
    if not isinstance(polygons, list):
        raise ValueError(f"expected a list of polygons per instance, got {type(polygons)}")
    arrays = [np.array(p.tolist() if isinstance(p, Tensor) else p, dtype=float) for p in polygons]
    for array in arrays:
        if len(array) % 2 != 0 or len(array) < _MIN_COORDINATES:
            raise ValueError(f"Cannot create a polygon from {len(array)} coordinates.")
    return arrays
