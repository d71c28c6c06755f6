"""The augmentations themselves. All draw from numpy's global generator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from fvcore.transforms.transform import (
    BlendTransform,
    CropTransform,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    Transform,
    TransformList,
    VFlipTransform,
)
from PIL import Image

from .augmentation import Augmentation, _transform_to_aug
from .transform import ResizeTransform

__all__ = [
    "FixedSizeCrop",
    "RandomApply",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomCrop_CategoryAreaConstraint",
    "RandomFlip",
    "RandomSaturation",
    "ResizeScale",
    "ResizeShortestEdge",
]

_CROP_TYPES = ("relative_range", "relative", "absolute", "absolute_range")
_MAX_CROP_ATTEMPTS = 10
_RGB_TO_GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class RandomApply(Augmentation):
    """Apply ``tfm_or_aug`` with probability ``prob``."""

    def __init__(self, tfm_or_aug: Transform | Augmentation, prob: float = 0.5):
        assert 0.0 <= prob <= 1.0, f"Probability must be between 0.0 and 1.0 (given: {prob})"
        self.aug = _transform_to_aug(tfm_or_aug)
        self.prob = prob

    def get_transform(self, *args: Any) -> Transform:
        if self._rand_range() < self.prob:
            return self.aug.get_transform(*args)
        return NoOpTransform()

    def __call__(self, aug_input: Any) -> Transform:
        return self.aug(aug_input) if self._rand_range() < self.prob else NoOpTransform()


class RandomFlip(Augmentation):
    """Flip with probability ``prob``, either horizontally or vertically."""

    def __init__(self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False):
        if horizontal and vertical:
            raise ValueError("Cannot do both horiz and vert. Please use two RandomFlip instead.")
        if not horizontal and not vertical:
            raise ValueError("At least one of horiz or vert has to be True!")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        if self._rand_range() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(w) if self.horizontal else VFlipTransform(h)


class ResizeShortestEdge(Augmentation):
    """Scale the shorter edge to a drawn length, the longer one to at most ``max_size``.

    Args:
        short_edge_length: pixels; [min, max], both included, for "range", the options for
            "choice", or one int. A drawn 0 means no resize.
        sample_style: "range" or "choice".
        interp: a PIL interpolation code.
    """

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Image.BILINEAR,
    ):
        assert sample_style in ("range", "choice"), sample_style
        self.is_range = sample_style == "range"
        if isinstance(short_edge_length, int):
            short_edge_length = (short_edge_length, short_edge_length)
        assert not self.is_range or len(short_edge_length) == 2, (
            "short_edge_length must be two values using 'range' sample style. "
            f"Got {short_edge_length}!"
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
    """Fit the image, aspect ratio kept, into the target size times a drawn scale
    (large-scale jittering, arXiv 2012.07177; with :class:`FixedSizeCrop` after it).
    """

    def __init__(
        self,
        min_scale: float,
        max_scale: float,
        target_height: int,
        target_width: int,
        interp: int = Image.BILINEAR,
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        scale = np.random.uniform(self.min_scale, self.max_scale)
        h, w = image.shape[:2]
        ratio = min(self.target_height * scale / h, self.target_width * scale / w)
        new_h, new_w = (int(np.round(side * ratio)) for side in (h, w))
        return ResizeTransform(h, w, new_h, new_w, self.interp)


class FixedSizeCrop(Augmentation):
    """Crop at random to ``crop_size`` (H, W), and pad smaller images at the right and bottom.

    Args:
        pad: leave images smaller than the crop at their size if False.
        pad_value, seg_pad_value: fill for images and for segmentations.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        pad: bool = True,
        pad_value: float = 128.0,
        seg_pad_value: int = 255,
    ):
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> TransformList:
        size = np.array(image.shape[:2])
        target = np.array(self.crop_size)
        room = np.maximum(size - target, 0) * np.random.uniform(0.0, 1.0)  # one draw for both axes
        y0, x0 = np.round(room).astype(int)
        transforms: list[Transform] = [
            CropTransform(x0, y0, target[1], target[0], size[1], size[0])
        ]
        if self.pad:
            pad_h, pad_w = np.maximum(target - size, 0)
            kept_h, kept_w = np.minimum(size, target)
            transforms.append(
                PadTransform(0, 0, pad_w, pad_h, kept_w, kept_h, self.pad_value, self.seg_pad_value)
            )
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

    def get_transform(self, image: np.ndarray) -> Transform:
        return self._place(image.shape[:2])

    def _place(self, image_size: tuple[int, int]) -> CropTransform:
        """Draw a size, then a position."""
        h, w = image_size
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


class RandomCrop_CategoryAreaConstraint(Augmentation):
    """:class:`RandomCrop` that tries, ten times at most, for a crop in which several categories
    occur and none covers ``single_category_max_area`` of the labeled pixels or more.

    Args:
        single_category_max_area: share of the crop; 1.0 turns the constraint off.
        ignored_category: label that is not counted.
    """

    def __init__(
        self,
        crop_type: str,
        crop_size: tuple[float, float],
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ):
        self.crop_aug = RandomCrop(crop_type, crop_size)
        self._init(locals())

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        if self.single_category_max_area >= 1.0:
            return self.crop_aug.get_transform(image)
        for _ in range(_MAX_CROP_ATTEMPTS):
            crop = self.crop_aug._place(sem_seg.shape)
            labels, counts = np.unique(crop.apply_segmentation(sem_seg), return_counts=True)
            if self.ignored_category is not None:
                counts = counts[labels != self.ignored_category]
            if len(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area:
                break
        return crop


class _RandomBlend(Augmentation):
    """Move the image away from (or toward) another one: ``w * image + (1 - w) * other``, with
    ``w`` uniform in [intensity_min, intensity_max); 1 changes nothing.
    """

    def __init__(self, intensity_min: float, intensity_max: float):
        self._init(locals())

    def _other(self, image: np.ndarray) -> np.ndarray | float:
        raise NotImplementedError

    def get_transform(self, image: np.ndarray) -> BlendTransform:
        w = np.random.uniform(self.intensity_min, self.intensity_max)
        return BlendTransform(src_image=self._other(image), src_weight=1 - w, dst_weight=w)


class RandomContrast(_RandomBlend):
    """Blend with the image's mean."""

    def _other(self, image: np.ndarray) -> float:
        return image.mean()


class RandomBrightness(_RandomBlend):
    """Blend with black."""

    def _other(self, image: np.ndarray) -> float:
        return 0


class RandomSaturation(_RandomBlend):
    """Blend with the gray version; the image must be RGB."""

    def _other(self, image: np.ndarray) -> np.ndarray:
        assert image.shape[-1] == 3, "RandomSaturation only works on RGB images"
        return image.dot(_RGB_TO_GRAY)[:, :, np.newaxis]
