"""Augmentation with refined pseudo-labels: images exchange instances (paper, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import configurable
from torch import Generator, Tensor

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.structures import PseudoLabels


class ARP:
    """Pastes instances between pairs of images of a batch, both ways.

    The batch is that of one process: images on different processes are never paired. Where several
    share a batch, each draws its own pairs, so that the pairs differ from those of one process.

    Of B images, ``max(1, floor(pair_fraction * B))`` disjoint pairs are drawn (none if B < 2). Each
    image of a pair receives the other's instances of at least ``min_area`` px, as they were before
    any pasting. On an image that received something all masks end up disjoint, later ones over
    earlier ones and pasted ones over all of its own; instances of which nothing is left are
    dropped.

    Static placement pastes in place, clipped to the receiving frame. Random placement draws for
    each instance a scale and a position at which its scaled box lies inside the receiving frame
    (or covers it, along an axis where it is too long); the image is read bilinearly and the mask at
    the nearest pixel, through the same transform.

    Args:
        min_area: px of the refined mask.
        pair_fraction: pairs an image of the batch, in (0, 0.5].
        random_placement: False: static; True: dynamic.
        scale_range: (low, high) of the scale, > 0; dynamic only.

    Raises:
        InputError: if an argument is out of range.
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
        if min_area < 0:
            raise InputError(f"min_area (S4M.ARP.MIN_AREA_FRACTION) must be >= 0, got {min_area}")
        if not 0.0 < pair_fraction <= 0.5:
            raise InputError(
                f"pair_fraction (S4M.ARP.PAIR_FRACTION) must lie in (0, 0.5], got {pair_fraction}"
            )
        if len(scale_range) != 2 or not 0.0 < scale_range[0] <= scale_range[1]:
            raise InputError(
                f"scale_range (S4M.ARP.SCALE_RANGE) must be 0 < low <= high, got {scale_range}"
            )
        self.min_area = min_area
        self.pair_fraction = pair_fraction
        self.random_placement = random_placement
        self.scale_range = tuple(scale_range)

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
        """Exchange instances; the inputs are not changed, but images without a paste are returned.

        Args:
            images: (3, H, W) each, uint8 or floating point, of any sizes.
            labels: refined pseudo-labels at the size of their image.
            generators: one for each image, on any device; None: PyTorch's own. The first draws the
                pairs, then each draws the placements of what its image receives.

        Raises:
            InputError: if numbers or sizes of images and labels disagree.
        """
        _check_batch(images, labels, generators)
        generators = generators or [None] * len(images)
        new_images, new_labels = list(images), list(labels)
        for first, second in self._draw_pairs(len(images), generators):
            for source, base in ((first, second), (second, first)):
                new_images[base], new_labels[base] = self._paste(
                    images[source], labels[source], images[base], labels[base], generators[base]
                )
        return new_images, new_labels

    def _draw_pairs(self, batch: int, generators: Sequence[Generator | None]) -> list[list[int]]:
        if batch < 2:
            return []
        order = torch.randperm(batch, generator=generators[0], device=_device_of(generators[0]))
        pairs = max(1, math.floor(self.pair_fraction * batch))
        return order[: 2 * pairs].view(pairs, 2).tolist()

    def _paste(
        self,
        source: Tensor,
        source_labels: PseudoLabels,
        base: Tensor,
        base_labels: PseudoLabels,
        generator: Generator | None,
    ) -> tuple[Tensor, PseudoLabels]:
        pasted = source_labels[source_labels.masks.sum(dim=(1, 2)) >= self.min_area]
        if not len(pasted):
            return base, base_labels
        size = base_labels.image_size
        if self.random_placement:
            placement = draw_placement(pasted.masks, size, self.scale_range, generator)
        else:
            placement = Placement.in_place(pasted.masks)
        masks = torch.cat([base_labels.masks, placement.place_masks(pasted.masks, size)])
        owner = owner_map(masks)
        image = placement.place_pixels(source, base, owner - len(base_labels))
        index = torch.arange(len(masks), dtype=owner.dtype, device=owner.device)
        merged = PseudoLabels(
            labels=torch.cat([base_labels.labels, pasted.labels]),
            masks=owner == index[:, None, None],
            scores=torch.cat([base_labels.scores, pasted.scores]),
        )
        return image, merged[merged.masks.flatten(1).any(dim=1)]


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

    @classmethod
    def in_place(cls, masks: Tensor) -> Placement:
        """The identity for each of the (N, H, W) ``masks``."""
        ones = torch.ones(len(masks), device=masks.device)
        return cls(scale=ones, offset=ones.new_zeros(len(masks), 2))

    def to_source(self, centers: Tensor, axis: int) -> Tensor:
        """(N, L) source coordinates along ``axis`` (0: x, 1: y) of L base coordinates."""
        return (centers - self.offset[:, axis, None]) / self.scale[:, None]

    def place_masks(self, masks: Tensor, size: tuple[int, int]) -> Tensor:
        """(N, H, W) masks of the source in the base frame of ``size``, nearest pixel."""
        indices, inside = [], []
        for axis, length, limit in ((1, size[0], masks.shape[1]), (0, size[1], masks.shape[2])):
            centers = torch.arange(length, device=masks.device) + 0.5
            index = self.to_source(centers, axis).floor().long()
            inside.append((index >= 0) & (index < limit))
            indices.append(index.clamp(0, limit - 1))
        instance = torch.arange(len(masks), device=masks.device)[:, None, None]
        placed = masks[instance, indices[0][:, :, None], indices[1][:, None, :]]
        return placed & inside[0][:, :, None] & inside[1][:, None, :]

    def place_pixels(self, source: Tensor, base: Tensor, owner: Tensor) -> Tensor:
        """A copy of ``base`` with the pixels that ``owner`` (H, W) >= 0 assigns to an instance.

        Only these pixels are read from ``source``, bilinearly (its border is repeated); where the
        transform is the identity they are exact.
        """
        rows, columns = torch.nonzero(owner >= 0, as_tuple=True)
        instance = owner[rows, columns].long()
        points = torch.stack([columns, rows], dim=-1) + 0.5
        points = (points - self.offset[instance]) / self.scale[instance, None]
        image = base.clone()
        image[:, rows, columns] = _read_bilinear(source, points).to(base.dtype)
        return image


def draw_placement(
    masks: Tensor,
    size: tuple[int, int],
    scale_range: tuple[float, float],
    generator: Generator | None = None,
) -> Placement:
    """A random scale and position in a frame of ``size`` (H, W) for each non-empty mask.

    Three draws an instance, on the generator's device: scale, x and y.
    """
    draws = torch.rand((len(masks), 3), generator=generator, device=_device_of(generator))
    draws = draws.to(masks.device)
    low, high = scale_range
    scale = low + (high - low) * draws[:, 0]
    starts, ends = zip(_extent(masks.any(dim=1)), _extent(masks.any(dim=2)), strict=True)
    start, end = torch.stack(starts, dim=-1), torch.stack(ends, dim=-1)  # (N, 2), (x, y)
    slack = start.new_tensor(size[::-1]) - scale[:, None] * (end - start)
    return Placement(scale=scale, offset=draws[:, 1:] * slack - scale[:, None] * start)


def owner_map(masks: Tensor) -> Tensor:
    """(H, W) int16: the last of the (N, H, W) masks that covers a pixel, -1 where none does."""
    order = torch.arange(len(masks), dtype=torch.int16, device=masks.device)
    return torch.where(masks, order[:, None, None], -1).amax(dim=0)


def _read_bilinear(image: Tensor, points: Tensor) -> Tensor:
    """(3, P) values of ``image`` (3, H, W) at P points (x, y) in continuous pixels."""
    limit = points.new_tensor(image.shape[:0:-1]) - 1
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


def _extent(profile: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row of (N, L), float32."""
    profile = profile.to(torch.uint8)
    start = profile.argmax(dim=1)
    end = profile.shape[1] - profile.flip(1).argmax(dim=1)
    return start.float(), end.float()


def _device_of(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _crop_area(cfg) -> float:
    """Area of the training crop in px."""
    if cfg.INPUT.DATASET_MAPPER_NAME == "coco_instance_lsj":
        return float(cfg.INPUT.IMAGE_SIZE) ** 2
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute":
        return float(math.prod(cfg.INPUT.CROP.SIZE))
    raise ConfigError(
        "S4M.ARP.MIN_AREA_FRACTION is a fraction of the training crop, but INPUT.CROP names no "
        'size in pixels: set INPUT.CROP.ENABLED True and INPUT.CROP.TYPE "absolute", or '
        "S4M.ARP.ENABLED False"
    )


def _check_batch(images, labels, generators) -> None:
    if len(images) != len(labels) or (generators and len(generators) != len(images)):
        raise InputError(
            f"{len(images)} images need as many labels and generators, got {len(labels)} and "
            f"{len(generators or [])}"
        )
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        if image.ndim != 3 or tuple(image.shape[1:]) != label.image_size:
            raise InputError(
                f"image {index} is {tuple(image.shape)} but its masks are {label.image_size}: "
                "ARP needs pseudo-labels at image size"
            )
