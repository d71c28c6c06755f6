"""Where pasted instances go: in ARP's dynamic variant, at a scale and position of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from s4m_d2.structures import mask_boxes
from s4m_d2.transfers import to_device


@dataclass(frozen=True)
class Placement:
    """Where N instances of a source frame go in a base frame: base = scale * source + offset.

    Coordinates are continuous pixels; pixel (i, j) has its center at (j + 0.5, i + 0.5).

    Attributes:
        scale: (N,) float32, > 0.
        offset: (N, 2) float32, (x, y).
    """

    scale: Tensor
    offset: Tensor

    def place_masks(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, H, W) masks of the source in the base frame of ``size``, nearest pixel."""
        count, height, width = masks.shape
        (rows, row_inside), (columns, column_inside) = (
            self._nearest(axis, length, limit)
            for axis, length, limit in ((1, size[0], height), (0, size[1], width))
        )
        rows = rows + height * torch.arange(count, device=masks.device)[:, None]
        placed = masks.flatten(0, 1).index_select(0, rows.flatten()).view(count, size[0], width)
        placed = placed.gather(2, columns[:, None, :].expand(-1, size[0], -1))
        return placed & row_inside[:, :, None] & column_inside[:, None, :]

    def place_pixels(self, source: Tensor, base: Tensor, covered: Tensor, owner: Tensor) -> Tensor:
        """A copy of ``base`` with the pixels that an instance has ``covered``, (H, W) bool.

        They are read from ``source``, bilinearly (its border is repeated), through the transform of
        the instance that ``owner`` (H, W) numbers, from 0.
        """
        instance = owner.flatten().long().clamp(0, len(self.scale) - 1)
        pixels, width = torch.arange(len(instance), device=owner.device), base.shape[2]
        points = torch.stack([pixels % width, pixels // width], dim=-1) + 0.5
        points = (points - self.offset[instance]) / self.scale[instance, None]
        read = _read_bilinear(source, points).to(base.dtype)
        return torch.where(covered, read.view_as(base), base)

    def _nearest(self, axis: int, length: int, limit: int) -> tuple[Tensor, Tensor]:
        """(N, L) source pixels along ``axis`` (0: x, 1: y) of L base pixels, and which exist."""
        centers = torch.arange(length, device=self.scale.device) + 0.5
        index = ((centers - self.offset[:, axis, None]) / self.scale[:, None]).floor().long()
        return index.clamp(0, limit - 1), (index >= 0) & (index < limit)


def draw_placement(
    masks: Tensor,
    size: tuple[int, int],
    scale_range: tuple[float, float],
    generator: Generator | None = None,
) -> Placement:
    """A random scale and position in a frame of ``size`` (H, W) for each non-empty mask.

    Three draws per instance, on the generator's device: scale, x and y.
    """
    draws = torch.rand((len(masks), 3), generator=generator, device=device_of(generator))
    draws = to_device(draws, masks.device)
    low, high = scale_range
    scale = low + (high - low) * draws[:, 0]
    start, end = mask_boxes(masks).split(2, dim=1)  # (N, 2), (x, y)
    slack = to_device(size[::-1], masks.device, start.dtype) - scale[:, None] * (end - start)
    return Placement(scale=scale, offset=draws[:, 1:] * slack - scale[:, None] * start)


def device_of(generator: Generator | None) -> torch.device:
    """Where a generator draws; PyTorch's own one: on the CPU."""
    return torch.device("cpu") if generator is None else generator.device


def _read_bilinear(image: Tensor, points: Tensor) -> Tensor:
    """(3, P) values of ``image`` (3, H, W) at P points (x, y) in continuous pixels."""
    limit = to_device(np.array(image.shape[:0:-1]) - 1, points.device, points.dtype)
    points = (points - 0.5).clamp(points.new_zeros(2), limit)
    floor = points.floor()
    x0, y0 = floor.long().unbind(-1)
    x1, y1 = torch.minimum(floor + 1, limit).long().unbind(-1)
    values = image if image.is_floating_point() else image.to(torch.float32)
    wx, wy = (points - floor).to(values.dtype).unbind(-1)
    top = torch.lerp(values[:, y0, x0], values[:, y0, x1], wx)
    bottom = torch.lerp(values[:, y1, x0], values[:, y1, x1], wx)
    read = torch.lerp(top, bottom, wy)
    return read if image.is_floating_point() else read.round()
