"""Geometry that computes only what a crop keeps: the same pixels as Detectron2's, in less time.

Detectron2 resizes the whole image and then cuts the crop out. Here the transforms are drawn from
the image's size alone, and then applied together. That works for the transforms listed here; all
others are applied one by one by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from PIL import Image

# Augmentations that look at nothing but the size of the image. Subclasses may look at more.
_SIZE_ONLY = {
    T.CropTransform,
    T.FixedSizeCrop,
    T.RandomCrop,
    T.RandomFlip,
    T.ResizeScale,
    T.ResizeShortestEdge,
}
_FLIPS = {T.HFlipTransform: 1, T.VFlipTransform: 0}  # OpenCV's codes
_BILINEAR_REACH = 1  # source pixels on each side; times the scale where the image shrinks
_ROUNDING = 1  # source pixels, more than enough for Pillow's rounding of a filter's bounds


def draw_transforms(
    augmentations: Sequence[T.Augmentation], image_size: tuple[int, int]
) -> T.TransformList | None:
    """The transforms that augmentations choose for an image, with the draws they always make.

    Returns:
        None, and nothing is drawn, where the size (H, W) alone does not tell.

    Raises:
        ValueError: of an image so narrow, nothing is left after resizing.
    """
    if not all(type(augmentation) in _SIZE_ONLY for augmentation in augmentations):
        return None
    if any(isinstance(a, T.FixedSizeCrop) and a.pad for a in augmentations):
        return None
    return T.AugmentationList(augmentations)(_SizeInput(image_size))


class _SizeInput(T.AugInput):
    """An image of a size, without memory of its own, for augmentations to look at."""

    image: np.ndarray

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(_of_size(size))

    def transform(self, tfm: T.Transform) -> None:
        for step in _steps(tfm):
            height, width = self.image.shape[:2]
            if type(step) is T.ResizeTransform:
                height, width = step.new_h, step.new_w
                if min(height, width) < 1:
                    raise ValueError("height and width must be > 0")
            elif type(step) is T.CropTransform:
                rows, columns = _window(step, height, width)
                height, width = len(rows), len(columns)
            self.image = _of_size((height, width))


def _of_size(size: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (*size, 3))


def _steps(transform: T.Transform) -> list[T.Transform]:
    """Single transforms, without those that do nothing."""
    steps = transform.transforms if isinstance(transform, T.TransformList) else [transform]
    return [step for step in steps if type(step) is not T.NoOpTransform]


def _window(crop: T.CropTransform, height: int, width: int) -> tuple[range, range]:
    """Rows and columns that a crop keeps of an image, which may be smaller."""
    return range(height)[crop.y0 : crop.y0 + crop.h], range(width)[crop.x0 : crop.x0 + crop.w]


def transform_image(image: np.ndarray, transforms: T.TransformList) -> np.ndarray:
    """Equal to ``transforms.apply_image(image)``.

    Args:
        image: (H, W, 3) uint8.
        transforms: any.

    Returns:
        (H', W', 3) uint8, may share the image's memory.
    """
    steps = _steps(transforms)
    while steps:
        step = steps.pop(0)
        if (
            type(step) is T.ResizeTransform
            and step.interp == Image.Resampling.BILINEAR
            and steps
            and type(steps[0]) is T.CropTransform
        ):
            image = _resize_and_crop(image, step, steps.pop(0))
        elif type(step) in _FLIPS:
            image = cv2.flip(image, _FLIPS[type(step)])
        else:
            image = step.apply_image(image)
    return image


def _resize_and_crop(
    image: np.ndarray, resize: T.ResizeTransform, crop: T.CropTransform
) -> np.ndarray:
    """Each axis is resized at full length, but only for the lines that the crop needs.

    Pillow rounds between the two axes. Of an image that becomes no less high, it takes the width
    first, so the same steps give its exact values; else some versions take the height first, and
    the whole image, which is not larger then, is resized as ever. (Pillow can resize a part of an
    image at once, but then it rounds that part's place.)
    """
    height = image.shape[0]
    rows, columns = _window(crop, resize.new_h, resize.new_w)
    is_whole = (len(rows), len(columns)) == (resize.new_h, resize.new_w)
    if is_whole or resize.new_h < height:
        return crop.apply_image(resize.apply_image(image))
    scale = height / resize.new_h
    margin = _BILINEAR_REACH * max(scale, 1) + _ROUNDING
    top = max(math.floor((rows.start + 0.5) * scale - margin), 0)
    bottom = min(math.ceil((rows.stop - 0.5) * scale + margin), height)

    strip = Image.fromarray(image[top:bottom])
    strip = strip.resize((resize.new_w, bottom - top), Image.Resampling.BILINEAR)
    strip = strip.crop((columns.start, 0, columns.stop, bottom - top))
    column = Image.new(strip.mode, (len(columns), height))
    column.paste(strip, (0, top))
    column = column.resize((len(columns), resize.new_h), Image.Resampling.BILINEAR)
    return np.asarray(column.crop((0, rows.start, len(columns), rows.stop)))


def source_pixels(
    transforms: T.TransformList, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Where the pixels of a transformed segmentation come from.

    Args:
        transforms: any.
        image_size: (H, W) before them.

    Returns:
        ``rows`` (H',) and ``columns`` (W',), monotone integers: ``apply_segmentation`` of a uint8
        map equals ``map[rows][:, columns]``. None where transforms are not known to do that.
    """
    rows: np.ndarray = np.arange(image_size[0])
    columns: np.ndarray = np.arange(image_size[1])
    for step in _steps(transforms):
        if type(step) is T.ResizeTransform:
            rows = rows[_nearest(step.h, step.new_h)]
            columns = columns[_nearest(step.w, step.new_w)]
        elif type(step) is T.CropTransform:
            kept_rows, kept_columns = _window(step, len(rows), len(columns))
            rows = rows[kept_rows.start : kept_rows.stop]
            columns = columns[kept_columns.start : kept_columns.stop]
        elif type(step) is T.HFlipTransform:
            columns = columns[::-1]
        elif type(step) is T.VFlipTransform:
            rows = rows[::-1]
        else:
            return None
    return rows, columns


def _nearest(length: int, new_length: int) -> np.ndarray:
    """(new_length,) indices of the pixels that Pillow's nearest resize takes."""
    ramp = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(ramp.resize((new_length, 1), Image.Resampling.NEAREST))[0]
