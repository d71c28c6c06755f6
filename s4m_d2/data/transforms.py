"""Geometry of labeled and unlabeled views, and color distortion of the weak view.

Detectron2 resizes the whole image and then crops it. Here its transforms are drawn from the image's
size alone and then applied together, which gives the same pixels in less time. Other transforms are
applied one by one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry
from PIL import Image

from s4m_d2.errors import DatasetError, registered, require

GEOMETRY_REGISTRY = Registry("GEOMETRY")
"""Geometry of the training views by INPUT.DATASET_MAPPER_NAME: ``cfg -> list[Augmentation]``."""

_NARROW = 10  # ratio of an image's sides above which resizing may leave no pixel of the shorter
_SEED_WORDS = 8  # 32-bit words that initialize numpy's global generator
# Augmentations that depend only on the size of the image. Subclasses may depend on more.
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
_LEVELS = np.arange(256, dtype=np.uint8)  # all values of a channel, as a look-up table
_HUE_RANGE = 180  # of OpenCV's 8-bit HSV, in half degrees
# SSD's color distortion: probability of each step, and of contrast before saturation; largest shift
# of levels; range of the factors of contrast and saturation; largest turn of the hue, half degrees.
_PROBABILITY, _BRIGHTNESS, _FACTORS, _HUE = 0.5, 32, (0.5, 1.5), 18


def build_geometry(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the geometry of labeled and unlabeled images.

    Raises:
        ConfigError: INPUT.DATASET_MAPPER_NAME has no registered geometry.
    """
    key = "The geometry of INPUT.DATASET_MAPPER_NAME (s4m_d2.data.GEOMETRY_REGISTRY)"
    return registered(GEOMETRY_REGISTRY, key, cfg.INPUT.DATASET_MAPPER_NAME)(cfg)


@GEOMETRY_REGISTRY.register()
def mask_former_instance(cfg: CfgNode) -> list[T.Augmentation]:
    """Cityscapes: random shortest edge, crop of fixed size, flip."""
    resize = T.ResizeShortestEdge(
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    )
    crop = cfg.INPUT.CROP
    share, expected = crop.SINGLE_CATEGORY_MAX_AREA, "1.0: unlabeled images have no categories"
    require("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", share, share >= 1, expected)
    crops = [T.RandomCrop(crop.TYPE, crop.SIZE)] if crop.ENABLED else []
    return [resize, *crops, *_flip(cfg)]


@GEOMETRY_REGISTRY.register()
def coco_instance_lsj(cfg: CfgNode) -> list[T.Augmentation]:
    """COCO: large-scale jitter. The crop is not padded: a view contains content only."""
    side = cfg.INPUT.IMAGE_SIZE
    return [
        *_flip(cfg),
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, side, side),
        T.FixedSizeCrop((side, side), pad=False),
    ]


def _flip(cfg: CfgNode) -> list[T.Augmentation]:
    kind = cfg.INPUT.RANDOM_FLIP
    is_known = kind in ("none", "horizontal", "vertical")
    require("INPUT.RANDOM_FLIP", kind, is_known, "none, horizontal or vertical")
    if kind == "none":
        return []
    return [T.RandomFlip(horizontal=kind == "horizontal", vertical=kind == "vertical")]


def of_tile(geometry: Sequence[T.Augmentation], record: dict) -> list[T.Augmentation]:
    """Prepend the crop of the record's tile, if it has one (:mod:`s4m_d2.tiling`)."""
    if "tile" not in record:
        return list(geometry)
    x0, y0, x1, y1 = record["tile"]
    return [T.CropTransform(x0, y0, x1 - x0, y1 - y0), *geometry]


@contextlib.contextmanager
def seeded_numpy(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, used by Detectron2's augmentations, and restore it."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(_SEED_WORDS))
    try:
        yield
    finally:
        np.random.set_state(state)


def apply_geometry(
    augmentations: Sequence[T.Augmentation], image: np.ndarray, seed: int, name: str = "An image"
) -> tuple[np.ndarray, T.TransformList]:
    """Transform an image, (H, W, 3) uint8, as ``seed`` decides, by augmentations that see it only.

    Returns:
        The view, (H', W', 3) uint8, and the transforms that made it.

    Raises:
        DatasetError: of an image so narrow, nothing may be left after resizing.
    """
    short, long = sorted(image.shape[:2])
    is_narrow = long > _NARROW * short
    of_size_alone = all(
        type(a) in _SIZE_ONLY and not (isinstance(a, T.FixedSizeCrop) and a.pad)
        for a in augmentations
    )
    view = _SizeInput(image) if of_size_alone else T.AugInput(image)
    try:
        if is_narrow and of_size_alone:  # whatever is drawn: checks and training agree
            _draw(list(map(_smallest, augmentations)), _SizeInput(image), seed)
        transforms = _draw(augmentations, view, seed)
    except ValueError as error:
        if not is_narrow:
            raise
        raise DatasetError(
            f"{name} has (height, width) {image.shape[:2]}, too narrow for the sizes of INPUT "
            f"({error}). Crop the image, or take it out of the data set."
        ) from error
    return transform_image(image, transforms) if of_size_alone else view.image, transforms


def _draw(augmentations: Sequence[T.Augmentation], view: T.AugInput, seed: int) -> T.TransformList:
    with seeded_numpy(seed):
        return T.AugmentationList(augmentations)(view)


def _smallest(augmentation: T.Augmentation) -> T.Augmentation:
    """Fix a random scale at its smallest value; other augmentations are unchanged."""
    if type(augmentation) is not T.ResizeScale:
        return augmentation
    scale = augmentation.min_scale
    return T.ResizeScale(scale, scale, augmentation.target_height, augmentation.target_width)


class _SizeInput(T.AugInput):
    """An image's size without its pixels, as input of augmentations."""

    image: np.ndarray

    def __init__(self, image: np.ndarray) -> None:
        super().__init__(np.broadcast_to(np.uint8(0), image.shape))

    def transform(self, tfm: T.Transform) -> None:
        pixels = source_pixels(tfm, self.image.shape[:2])
        assert pixels is not None  # of _SIZE_ONLY's transforms
        self.image = np.broadcast_to(np.uint8(0), (*map(len, pixels), 3))


def _steps(transform: T.Transform) -> list[T.Transform]:
    """Flatten to single transforms, without no-ops."""
    steps = transform.transforms if isinstance(transform, T.TransformList) else [transform]
    return [step for step in steps if type(step) is not T.NoOpTransform]


def transform_image(image: np.ndarray, transforms: T.TransformList) -> np.ndarray:
    """Equal to ``transforms.apply_image(image)``, both (H, W, 3) uint8; may share memory."""
    steps = _steps(transforms)
    while steps:
        step = steps.pop(0)
        is_bilinear = type(step) is T.ResizeTransform and step.interp == Image.Resampling.BILINEAR
        if is_bilinear and steps and type(steps[0]) is T.CropTransform:
            image = _resize_and_crop(image, step, steps.pop(0))
        elif type(step) in _FLIPS:
            image = cv2.flip(image, _FLIPS[type(step)])
        else:
            image = step.apply_image(image)
    return image


def _resize_and_crop(
    image: np.ndarray, resize: T.ResizeTransform, crop: T.CropTransform
) -> np.ndarray:
    """Resize and crop with the pixels of Pillow, computing only rows and columns of the crop.

    Pillow rounds between the two axes. If the height does not shrink, it resizes the width first,
    and the same steps give its exact values; otherwise some versions resize the height first, so
    the whole image is resized as usual. (Pillow can resize a part of an image, but then it rounds
    the part's position.)
    """
    height = image.shape[0]
    rows = range(resize.new_h)[crop.y0 : crop.y0 + crop.h]
    columns = range(resize.new_w)[crop.x0 : crop.x0 + crop.w]
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
    transforms: T.Transform, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Compute the source rows and columns of a segmentation of (H, W) after transforms.

    Returns:
        ``rows`` (H',) and ``columns`` (W',), monotone integers: ``apply_segmentation`` of a uint8
        map equals ``map[rows][:, columns]``. None for transforms of other kinds.
    """
    rows: np.ndarray = np.arange(image_size[0])
    columns: np.ndarray = np.arange(image_size[1])
    for step in _steps(transforms):
        if type(step) is T.ResizeTransform:
            rows = rows[_nearest(step.h, step.new_h)]
            columns = columns[_nearest(step.w, step.new_w)]
        elif type(step) is T.CropTransform:
            rows = rows[step.y0 : step.y0 + step.h]
            columns = columns[step.x0 : step.x0 + step.w]
        elif type(step) is T.HFlipTransform:
            columns = columns[::-1]
        elif type(step) is T.VFlipTransform:
            rows = rows[::-1]
        else:
            return None
    return rows, columns


def _nearest(length: int, new_length: int) -> np.ndarray:
    """(new_length,) source indices of Pillow's nearest resize."""
    ramp = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(ramp.resize((new_length, 1), Image.Resampling.NEAREST))[0]


class ColorDistortion:
    """SSD's color distortion with its amounts, as in Mask2Former.

    Brightness (shifted by up to 32 levels), then either contrast (0.5 to 1.5 times), saturation
    (0.5 to 1.5 times) and hue (rotated by up to 36 degrees), or saturation, hue and contrast. Each
    of the four, and each order, has probability 0.5.

    Args:
        image_format: "RGB" or "BGR", the order of the channels.
    """

    def __init__(self, image_format: str) -> None:
        self._to_hsv = getattr(cv2, f"COLOR_{image_format}2HSV")
        self._from_hsv = getattr(cv2, f"COLOR_HSV2{image_format}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distort a (H, W, 3) uint8 image into a new one, with draws from ``rng``."""
        contrast_first, *chosen = rng.random(5) < _PROBABILITY
        shift = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
        contrast, saturation = rng.uniform(*_FACTORS), rng.uniform(*_FACTORS)
        hue = int(rng.integers(-_HUE, _HUE, endpoint=True))
        brighten, change_contrast, saturate, rotate_hue = chosen

        levels = _LEVELS
        if brighten:
            levels = _scale_and_shift(levels, 1, shift)
        if change_contrast and contrast_first:
            levels = _scale_and_shift(levels, contrast, 0)
        image = cv2.LUT(image, levels)  # a copy, where no level changes
        if saturate or rotate_hue:
            hsv = cv2.cvtColor(image, self._to_hsv)
            hues = (_LEVELS.astype(int) + hue) % _HUE_RANGE if rotate_hue else _LEVELS
            saturations = _scale_and_shift(_LEVELS, saturation, 0) if saturate else _LEVELS
            per_channel = np.stack((hues, saturations, _LEVELS), axis=-1).astype(np.uint8)[None]
            cv2.LUT(hsv, per_channel, dst=image)
            image = cv2.cvtColor(image, self._from_hsv, dst=hsv)
        if change_contrast and not contrast_first:
            image = cv2.LUT(image, _scale_and_shift(_LEVELS, contrast, 0))
        return image


def _scale_and_shift(levels: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(levels.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)
