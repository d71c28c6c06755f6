"""Geometry of labeled and unlabeled views, and color distortion of the weak view.

Detectron2 resizes the whole image and then crops it. Here its transforms are drawn from the image's
size alone and then applied together, which gives the same pixels in less time. Other transforms are
applied one by one.
"""

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
# Augmentations that depend only on the size of the image. Subclasses may depend on more.
_SIZE_ONLY = (
    T.CropTransform, T.FixedSizeCrop, T.RandomCrop, T.RandomFlip, T.ResizeScale,
    T.ResizeShortestEdge,
)  # fmt: skip
_FLIPS = {T.HFlipTransform: 1, T.VFlipTransform: 0}  # OpenCV's codes
_LEVELS = np.arange(256, dtype=np.uint8)  # all values of a channel, as a look-up table


def build_geometry(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the geometry of labeled and unlabeled images; ConfigError: it is not registered."""
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
    kind, kinds = cfg.INPUT.RANDOM_FLIP, ("none", "horizontal", "vertical")
    require("INPUT.RANDOM_FLIP", kind, kind in kinds, "none, horizontal or vertical")
    flip = T.RandomFlip(horizontal=kind != "vertical", vertical=kind == "vertical")
    return [] if kind == "none" else [flip]


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
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    try:
        yield
    finally:
        np.random.set_state(state)


def apply_geometry(
    augmentations: Sequence[T.Augmentation], image: np.ndarray, seed: int, name: str = "An image"
) -> tuple[np.ndarray, T.TransformList]:
    """Transform an image, (H, W, 3) uint8, as ``seed`` decides, by augmentations that see it only.

    Returns the view, (H', W', 3) uint8, and the transforms that made it. DatasetError: of an image
    so narrow, nothing may be left after resizing.
    """
    is_narrow = max(image.shape[:2]) > _NARROW * min(image.shape[:2])
    of_size_alone = all(type(a) in _SIZE_ONLY and not getattr(a, "pad", 0) for a in augmentations)
    view = _SizeInput(image) if of_size_alone else T.AugInput(image)
    try:
        with seeded_numpy(seed):
            transforms = T.AugmentationList(augmentations)(view)
            if is_narrow and of_size_alone:  # whatever is drawn: checks and training agree
                T.AugmentationList(list(map(_smallest, augmentations)))(_SizeInput(image))
    except ValueError as error:
        if not is_narrow:
            raise
        raise DatasetError(
            f"{name} has (height, width) {image.shape[:2]}, too narrow for the sizes of INPUT "
            f"({error}). Crop the image, or take it out of the data set."
        ) from error
    return transform_image(image, transforms) if of_size_alone else view.image, transforms


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
    as here; otherwise some versions resize the height first, so the whole image is resized as
    usual. (Pillow's own ``box`` rounds the part's position.)
    """
    height = image.shape[0]
    rows = range(resize.new_h)[crop.y0 : crop.y0 + crop.h]
    columns = range(resize.new_w)[crop.x0 : crop.x0 + crop.w]
    is_whole = (len(rows), len(columns)) == (resize.new_h, resize.new_w)
    if is_whole or resize.new_h < height:
        return crop.apply_image(resize.apply_image(image))
    scale = height / resize.new_h
    margin = max(scale, 1) + 1  # a bilinear filter's reach, and its bounds' rounding
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
    """Compute ``rows`` (H',) and ``columns`` (W',), monotone integers, of a map of (H, W):
    ``apply_segmentation`` equals ``map[rows][:, columns]``. None for transforms of other kinds."""
    rows: np.ndarray
    rows, columns = map(np.arange, image_size)
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
    """SSD's color distortion, as in Mask2Former, of an ``image_format`` "RGB" or "BGR".

    Brightness (shifted by up to 32 levels), then either contrast (0.5 to 1.5 times), saturation
    (0.5 to 1.5 times) and hue (rotated by up to 36 degrees), or saturation, hue and contrast. Each
    of the four, and each order, has probability 0.5.
    """

    def __init__(self, image_format: str) -> None:
        self._to_hsv = getattr(cv2, f"COLOR_{image_format}2HSV")
        self._from_hsv = getattr(cv2, f"COLOR_HSV2{image_format}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distort a (H, W, 3) uint8 image into a new one, with draws from ``rng``."""
        contrast_first, brighten, change_contrast, saturate, rotate_hue = rng.random(5) < 0.5
        shift = rng.uniform(-32, 32)
        contrast, saturation = rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
        hue = int(rng.integers(-18, 18, endpoint=True))  # half degrees, as OpenCV's 8-bit HSV
        levels = _LEVELS
        if brighten:
            levels = _scale_and_shift(levels, 1, shift)
        if change_contrast and contrast_first:
            levels = _scale_and_shift(levels, contrast, 0)
        image = cv2.LUT(image, levels)  # a copy, where no level changes
        if saturate or rotate_hue:
            hsv = cv2.cvtColor(image, self._to_hsv)
            hues = (_LEVELS.astype(int) + hue) % 180 if rotate_hue else _LEVELS
            saturations = _scale_and_shift(_LEVELS, saturation, 0) if saturate else _LEVELS
            per_channel = np.stack((hues, saturations, _LEVELS), axis=-1).astype(np.uint8)[None]
            cv2.LUT(hsv, per_channel, dst=image)
            image = cv2.cvtColor(image, self._from_hsv, dst=hsv)
        if change_contrast and not contrast_first:
            image = cv2.LUT(image, _scale_and_shift(_LEVELS, contrast, 0))
        return image


def _scale_and_shift(levels: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(levels.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)
