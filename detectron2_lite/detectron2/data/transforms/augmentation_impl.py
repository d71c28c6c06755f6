"""The augmentations themselves. All draw from numpy's global generator."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from fvcore.transforms.transform import (
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from .augmentation import Augmentation
from .transform import ResizeTransform

__all__ = ["FixedSizeCrop", "RandomCrop", "RandomFlip", "ResizeScale", "ResizeShortestEdge"]

_CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")


class RandomFlip(Augmentation):
    """Flip with probability ``prob``, either horizontally or vertically."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if horizontal == vertical:
            raise ValueError("Exactly one of horizontal and vertical has to be True!")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(w) if self.horizontal else VFlipTransform(h)


class ResizeShortestEdge(Augmentation):
    """Scale the shorter edge to a drawn length, the longer one to at most ``max_size``.

    short_edge_length: pixels, an int or, for ``sample_style`` "range", (min, max), both included,
    and for "choice" the options. A drawn 0 means no resize. interp: a PIL code.
    """

    def __init__(
        self, short_edge_length: int | Sequence[int], max_size: int = sys.maxsize,
        sample_style: str = "range", interp: int = Image.BILINEAR,
    ):  # fmt: skip
        assert sample_style in ("range", "choice"), sample_style
        self.is_range = sample_style == "range"
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        assert not self.is_range or len(short_edge_length) == 2, (
            f"The 'range' sample style needs (min, max), got {short_edge_length}!"
        )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        if self.is_range:
            size = np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1)
        else:
            size = np.random.choice(self.short_edge_length)
        if size == 0:
            return NoOpTransform()
        new_h, new_w = self.get_output_shape(h, w, size, self.max_size)
        return ResizeTransform(h, w, new_h, new_w, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """(H, W) after the resize, rounded half up."""
        size = short_edge_length * 1.0
        scale = size / min(oldh, oldw)
        new_h, new_w = (size, scale * oldw) if oldh < oldw else (scale * oldh, size)
        if max(new_h, new_w) > max_size:
            scale = max_size * 1.0 / max(new_h, new_w)
            new_h, new_w = new_h * scale, new_w * scale
        return int(new_h + 0.5), int(new_w + 0.5)


class ResizeScale(Augmentation):
    """Fit the image, aspect ratio kept, into the target size times a drawn scale: the first half
    of large-scale jittering (arXiv 2012.07177), :class:`FixedSizeCrop` being the second.
    """

    def __init__(
        self, min_scale: float, max_scale: float, target_height: int, target_width: int,
        interp: int = Image.BILINEAR,
    ):  # fmt: skip
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        scale = np.random.uniform(self.min_scale, self.max_scale)
        h, w = image.shape[:2]
        ratio = min(self.target_height * scale / h, self.target_width * scale / w)
        new_h, new_w = (int(np.round(side * ratio)) for side in (h, w))
        return ResizeTransform(h, w, new_h, new_w, self.interp)


class FixedSizeCrop(Augmentation):
    """Crop at random to ``crop_size`` (H, W); with ``pad``, fill smaller images up at the right
    and bottom, with ``pad_value`` in images and ``seg_pad_value`` in segmentations.
    """

    def __init__(
        self, crop_size: tuple[int, int], pad: bool = True, pad_value: float = 128.0,
        seg_pad_value: int = 255,
    ):  # fmt: skip
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> TransformList:
        (h, w), (crop_h, crop_w) = image.shape[:2], self.crop_size
        share = np.random.uniform(0.0, 1.0)  # one draw for both axes
        x0, y0 = (int(np.round(max(room, 0) * share)) for room in (w - crop_w, h - crop_h))
        transforms: list[Transform] = [CropTransform(x0, y0, crop_w, crop_h, w, h)]
        if self.pad:
            pad_w, pad_h = max(crop_w - w, 0), max(crop_h - h, 0)
            kept = (min(w, crop_w), min(h, crop_h))
            fill = (self.pad_value, self.seg_pad_value)
            transforms.append(PadTransform(0, 0, pad_w, pad_h, *kept, *fill))
        return TransformList(transforms)


class RandomCrop(Augmentation):
    """Crop a rectangle at a random position. ``crop_type`` says what ``crop_size`` means:

    - "relative": (h, w) shares of the image, in (0, 1];
    - "relative_range": the smallest (h, w) shares; the share is drawn from [smallest, 1);
    - "absolute": (h, w) in pixels, at most the image;
    - "absolute_range": (min, max) in pixels for both sides, at most the image.
    """

    def __init__(self, crop_type: str, crop_size: tuple[float, float]):
        assert crop_type in _CROP_TYPES, f"crop_type must be one of {_CROP_TYPES}: {crop_type}"
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> CropTransform:
        h, w = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((h, w))
        assert h >= crop_h and w >= crop_w, f"{self} asks for more than the image of {(h, w)}."
        y0 = np.random.randint(h - crop_h + 1)
        x0 = np.random.randint(w - crop_w + 1)
        return CropTransform(x0, y0, crop_w, crop_h)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the crop in pixels; the two "range" types draw it."""
        h, w = image_size
        if self.crop_type == "absolute":
            return min(self.crop_size[0], h), min(self.crop_size[1], w)
        if self.crop_type == "absolute_range":
            low, high = self.crop_size
            assert low <= high, f"crop_size must be (min, max), got {self.crop_size}."
            crop_h = np.random.randint(min(h, low), min(h, high) + 1)
            crop_w = np.random.randint(min(w, low), min(w, high) + 1)
            return crop_h, crop_w
        share_h, share_w = self.crop_size
        if self.crop_type == "relative_range":
            smallest = np.asarray(self.crop_size, dtype=np.float32)
            share_h, share_w = smallest + np.random.rand(2) * (1 - smallest)
        return int(h * share_h + 0.5), int(w * share_w + 0.5)
