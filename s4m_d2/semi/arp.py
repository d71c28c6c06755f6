"""Augmentation with refined pseudo-labels: images exchange instances (paper, section 3.4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Generator, Tensor

from s4m_d2.errors import ConfigError, require
from s4m_d2.structures import MAX_BYTE, PseudoLabels, drop_empty, known_areas, mask_boxes
from s4m_d2.transfers import to_device


class ARP:
    """Pastes instances between pairs of images of a process' batch, both ways.

    Of B images, ``max(1, floor(pair_fraction * B))`` disjoint pairs are drawn (none if B < 2). Each
    image of a pair receives the other's instances of at least ``min_area`` px, as they were before
    any pasting. Afterwards all masks of a receiving image are disjoint: later ones occlude earlier
    ones, and pasted ones occlude the image's own. Completely occluded instances are dropped.

    Static placement pastes at the same position, clipped to the receiving frame. Random placement
    draws for each instance a scale and a position at which its scaled box is inside the receiving
    frame (or covers it, along an axis where it is too long). The same transform samples the image
    bilinearly and the mask at the nearest pixel.

    Synchronizes once for the areas after pasting, and once more unless the host knows the labels'.

    Args:
        min_area: px of the refined mask.
        pair_fraction: in (0, 0.5].
        random_placement: False: static; True: dynamic.
        scale_range: (low, high) of the scale, > 0; dynamic only.
    """

    @configurable
    def __init__(
        self,
        *,
        min_area: float,
        pair_fraction: float = 0.25,
        random_placement: bool = False,
        scale_range: tuple[float, float] = (0.8, 1.2),
    ) -> None:
        is_range = len(scale_range) == 2 and 0 < scale_range[0] <= scale_range[1]
        require("S4M.ARP.MIN_AREA_FRACTION", min_area, min_area >= 0, "0 or more")
        require("S4M.ARP.PAIR_FRACTION", pair_fraction, 0 < pair_fraction <= 0.5, "up to 0.5")
        require("S4M.ARP.SCALE_RANGE", scale_range, is_range, "0 < low <= high")
        self.min_area = min_area
        self.pair_fraction = pair_fraction
        self.random_placement = random_placement
        self.scale_range = (scale_range[0], scale_range[1])

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {
            "min_area": cfg.S4M.ARP.MIN_AREA_FRACTION * _crop_area(cfg),
            "pair_fraction": cfg.S4M.ARP.PAIR_FRACTION,
            "random_placement": cfg.S4M.ARP.RANDOM_PLACEMENT,
            "scale_range": cfg.S4M.ARP.SCALE_RANGE,
        }

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Tensor],
        labels: Sequence[PseudoLabels],
        generators: Sequence[Generator] | None = None,
    ) -> tuple[list[Tensor], list[PseudoLabels]]:
        """Exchange instances. Inputs are not changed; images without a paste are returned as is.

        Args:
            images: (3, H, W) each, uint8 or floating point, of any sizes.
            labels: refined pseudo-labels at the size of their image.
            generators: one for each image, on the CPU; None: PyTorch's own. The first draws the
                pairs, then each draws the placements of what its image receives.
        """
        sources: Sequence[Generator | None] = generators or [None] * len(images)
        labels = drop_empty(labels)
        rows = [np.flatnonzero(areas >= self.min_area) for areas in known_areas(labels)]
        new_images, new_labels = list(images), list(labels)
        for first, second in self._draw_pairs(len(images), sources):
            for source, base in ((first, second), (second, first)):
                pasted = images[source], labels[source][rows[source]]
                own = images[base], labels[base]
                new_images[base], new_labels[base] = self._paste(*pasted, *own, sources[base])
        return new_images, drop_empty(new_labels)

    def _draw_pairs(self, batch: int, generators: Sequence[Generator | None]) -> list[list[int]]:
        if batch < 2:
            return []
        order = torch.randperm(batch, generator=generators[0])
        pairs = max(1, math.floor(self.pair_fraction * batch))
        return order[: 2 * pairs].view(pairs, 2).tolist()

    def _paste(
        self,
        source: Tensor,
        pasted: PseudoLabels,
        base: Tensor,
        own: PseudoLabels,
        generator: Generator | None,
    ) -> tuple[Tensor, PseudoLabels]:
        if not len(pasted):
            return base, own
        size = own.image_size
        place = partial(_clip, size=size)
        if self.random_placement:
            placement = draw_placement(pasted.masks, size, self.scale_range, generator)
            place = partial(placement.place, size=size)
        placed = place(pasted.masks)
        owner, masks = _occluded(torch.cat([own.masks, placed]))
        covered = owner > len(own)
        if self.random_placement:
            image = placement.place_pixels(source, base, covered, owner - (len(own) + 1))
        else:
            image = _overwrite(base, place(source), covered)
        quality = doubts = None
        if own.quality is not None and pasted.quality is not None:
            quality = torch.cat([own.quality, pasted.quality])
        if own.doubts is not None and pasted.doubts is not None:
            # None where pasting has decided: of own ones where covered, of pasted ones outside.
            new = place(pasted.doubts).masked_fill(~placed, 0)
            doubts = torch.cat([own.doubts.masked_fill(covered, 0), new])
        return image, PseudoLabels(
            labels=torch.cat([own.labels, pasted.labels]),
            masks=masks,
            scores=torch.cat([own.scores, pasted.scores]),
            quality=quality,
            doubts=doubts,
        )


def _clip(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) values cropped, or padded with zeros, to ``size``, at the same position."""
    if values.shape[1:] == size:
        return values
    return F.pad(values, (0, size[1] - values.shape[2], 0, size[0] - values.shape[1]))


def _overwrite(base: Tensor, source: Tensor, covered: Tensor) -> Tensor:
    """``source`` where (H, W) ``covered``, else ``base``; both (3, H, W)."""
    if base.dtype != torch.uint8:
        return torch.where(covered, source.to(base.dtype), base)
    # Of bytes vectorized, as torch.where is not.
    return base ^ ((base ^ source) & (covered.view(torch.uint8) * MAX_BYTE))


def _occluded(masks: Tensor) -> tuple[Tensor, Tensor]:
    """(H, W) numbers, from 1, of the last of (N, H, W) bool masks that covers a pixel, 0 if none
    does; and the masks without what later ones cover.

    The numbers are uint8, or int16 for more than 255 masks; bytes are vectorized.
    """
    dtype = torch.uint8 if len(masks) <= MAX_BYTE else torch.int16
    numbers = torch.arange(1, len(masks) + 1, device=masks.device).to(dtype)[:, None, None]
    owner = (masks.view(torch.uint8) * numbers).amax(dim=0)
    left = torch.empty_like(masks, dtype=torch.uint8)
    return owner, torch.eq(owner, numbers, out=left).view(torch.bool)


@dataclass(frozen=True)
class Placement:
    """Placement of N instances of a source frame in a base frame: base = scale * source + offset.

    Coordinates are continuous pixels; pixel (i, j) has its center at (j + 0.5, i + 0.5).
    """

    scale: Tensor  #: (N,) float32, > 0
    offset: Tensor  #: (N, 2) float32, (x, y)

    def place(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Place (N, H, W) values of the source in the base frame of ``size``, nearest pixel; 0
        outside of the source."""
        count, height, width = values.shape
        rows, row_inside = self._nearest(1, size[0], height)
        columns, column_inside = self._nearest(0, size[1], width)
        rows = rows + height * torch.arange(count, device=values.device)[:, None]
        placed = values.flatten(0, 1).index_select(0, rows.flatten()).view(count, size[0], width)
        placed = placed.gather(2, columns[:, None, :].expand(-1, size[0], -1))
        return placed.masked_fill_(~(row_inside[:, :, None] & column_inside[:, None, :]), 0)

    def place_pixels(self, source: Tensor, base: Tensor, covered: Tensor, owner: Tensor) -> Tensor:
        """Copy ``base``, with what is ``covered``, (H, W) bool, sampled bilinearly from ``source``
        (its border is repeated) by the transform of the instance numbered in ``owner`` (H, W)."""
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
    """Draw a scale and a position in a frame of ``size`` (H, W) for each non-empty mask.

    Three draws per instance: scale, x and y.
    """
    draws = to_device(torch.rand((len(masks), 3), generator=generator), masks.device)
    low, high = scale_range
    scale = low + (high - low) * draws[:, 0]
    start, end = mask_boxes(masks).split(2, dim=1)  # (N, 2), (x, y)
    slack = to_device(size[::-1], masks.device, start.dtype) - scale[:, None] * (end - start)
    return Placement(scale=scale, offset=draws[:, 1:] * slack - scale[:, None] * start)


def _read_bilinear(image: Tensor, points: Tensor) -> Tensor:
    """(3, P) values of ``image`` (3, H, W) at P points (x, y) in continuous pixels."""
    limit = to_device(np.array(image.shape[:0:-1]) - 1, points.device, points.dtype)
    points = (points - 0.5).clamp(points.new_zeros(2), limit)
    floor = points.floor()
    x0, y0 = floor.long().unbind(-1)
    x1, y1 = torch.minimum(floor + 1, limit).long().unbind(-1)
    values = image if image.is_floating_point() else image.float()
    wx, wy = (points - floor).to(values.dtype).unbind(-1)
    top = torch.lerp(values[:, y0, x0], values[:, y0, x1], wx)
    bottom = torch.lerp(values[:, y1, x0], values[:, y1, x1], wx)
    read = torch.lerp(top, bottom, wy)
    return read if image.is_floating_point() else read.round()


def _crop_area(cfg) -> float:
    """Area of the training crop in px."""
    if cfg.INPUT.DATASET_MAPPER_NAME == "coco_instance_lsj":
        return float(cfg.INPUT.IMAGE_SIZE) ** 2
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute":
        return float(math.prod(cfg.INPUT.CROP.SIZE))
    raise ConfigError(
        "S4M.ARP.MIN_AREA_FRACTION is a fraction of the training crop, but INPUT.CROP has no "
        'size in pixels: set INPUT.CROP.ENABLED True and INPUT.CROP.TYPE "absolute", or '
        "S4M.ARP.ENABLED False"
    )
