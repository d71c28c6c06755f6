"""Views and masks are those of Detectron2's transforms, applied to whole images one by one, and
colors those of a distortion that is computed value by value."""

from itertools import product

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from data_scenes import HEIGHT, WIDTH
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from s4m_d2.config import add_s4m_config
from s4m_d2.data import ColorDistortion
from s4m_d2.data.segmentations import transform_masks
from s4m_d2.data.transforms import (
    apply_geometry,
    build_geometry,
    seeded_numpy,
    transform_image,
)
from s4m_d2.errors import ConfigError

GEOMETRIES = {
    "Cityscapes": [
        T.ResizeShortestEdge((20, 31, 47, 90, 130), 300, "choice"),
        T.RandomCrop("absolute", (25, 50)),
        T.RandomFlip(),
    ],
    "COCO": [T.RandomFlip(), T.ResizeScale(0.1, 3.0, 70, 70), T.FixedSizeCrop((70, 70), pad=False)],
    "vertical": [
        T.RandomCrop("relative", (0.8, 0.5)),
        T.RandomFlip(horizontal=False, vertical=True),
        T.ResizeScale(0.5, 2.0, 50, 90),
        T.RandomCrop("relative", (0.3, 0.4)),
    ],
    "not bilinear": [
        T.ResizeScale(0.5, 3.0, 50, 90, Image.BICUBIC),
        T.FixedSizeCrop((30, 30), pad=False),
    ],
    "resize alone": [T.ResizeShortestEdge((30, 40), 100)],
}


def config(**inputs):
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 48, 64)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = (24, 48)
    for key, value in inputs.items():
        cfg.INPUT[key] = value
    return cfg


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detectron2_s(augmentations, image, seed):
    """The slow form: every transform is applied to the whole image when it is drawn."""
    view = T.AugInput(image)
    with seeded_numpy(seed):
        transforms = T.AugmentationList(augmentations)(view)
    return view.image, transforms


def described(transforms):
    return [(type(t), {k: v for k, v in vars(t).items() if k != "self"}) for t in transforms]


@pytest.mark.parametrize("name", GEOMETRIES)
@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(12, 90), st.integers(12, 90)), seed=st.integers(0, 2**31))
def test_views_are_those_of_whole_images(name, size, seed):
    image = noise(*size, seed)
    view, transforms = apply_geometry(GEOMETRIES[name], image, seed)
    expected, slow = detectron2_s(GEOMETRIES[name], image, seed)
    assert described(transforms.transforms) == described(slow.transforms)
    assert np.array_equal(view, expected)


@pytest.mark.parametrize("new_size", [(614, 1228), (1331, 2662), (2048, 4096)])
def test_crops_of_cityscapes_size_are_exact_up_to_the_borders(new_size):
    image = np.tile(noise(256, 512), (4, 4, 1))
    room = new_size[0] - 512, new_size[1] - 1024
    resize = T.ResizeTransform(1024, 2048, *new_size)
    for y, x in ((0, 0), (room[0] // 3, room[1] // 2), room):
        transforms = T.TransformList([resize, T.CropTransform(x, y, 1024, 512)])
        assert np.array_equal(transform_image(image, transforms), transforms.apply_image(image))


class MyResize(T.ResizeScale):
    """A subclass that looks at the pixels."""

    def get_transform(self, image):
        assert image.any()
        return super().get_transform(image)


@pytest.mark.parametrize("foreign", [MyResize(0.5, 2.0, 40, 40), T.FixedSizeCrop((99, 99))])
def test_other_augmentations_see_the_image(foreign):
    image = noise(40, 60)
    augmentations = [*GEOMETRIES["Cityscapes"], foreign]
    for seed in range(5):
        view, _ = apply_geometry(augmentations, image, seed)
        assert np.array_equal(view, detectron2_s(augmentations, image, seed)[0])


def shapes(size, seed):
    """Masks of all kinds: blobs, noise, a line, all, nothing."""
    rng = np.random.default_rng(seed)
    masks = rng.random((7, *size)) < np.array([0.4, 0.01, 0.2, 1, 0, 0, 0])[:, None, None]
    masks[2, : size[0] // 2] = False
    masks[5, 3, 2:9] = True
    masks[6, 2:8, 4:7] = True
    return masks


def as_rle(mask, text):
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    if text:
        return {**rle, "counts": rle["counts"].decode()}
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat.astype(int), prepend=0, append=2))
    counts = np.diff(edges, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": [*counts[:1], 0, 0, *counts[1:]]}


@pytest.mark.parametrize("padded", [False, True], ids=["known", "foreign"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_masks_are_resampled_as_each_alone(name, padded):
    size = (41, 67)
    for seed, kind in product(range(6), ("text", "counts")):
        _, transforms = detectron2_s(GEOMETRIES[name], noise(*size), seed)
        view_size = transforms.apply_image(noise(*size)).shape[:2]
        if padded:  # a transform that is not known to take source pixels
            transforms = transforms + T.TransformList([T.PadTransform(1, 2, 3, 4)])
            view_size = view_size[0] + 6, view_size[1] + 4
        masks = shapes(size, seed)
        given_as = [as_rle(mask, kind == "text") for mask in masks]
        moved = transform_masks(given_as, transforms, size, view_size)
        expected = [transforms.apply_segmentation(m.astype(np.uint8)) for m in masks]
        assert np.array_equal(moved.numpy(), np.stack(expected).astype(bool))


def test_large_scale_jitter_returns_content_only():
    image = np.full((HEIGHT, WIDTH, 3), 77, dtype=np.uint8)
    geometry = build_geometry(config(DATASET_MAPPER_NAME="coco_instance_lsj", IMAGE_SIZE=40))
    views = [apply_geometry(geometry, image, seed)[0] for seed in range(20)]
    assert all((view == 77).all() for view in views)  # nothing is padded
    assert {view.shape[1] < 40 for view in views} == {True, False}
    assert max(map(max, (view.shape for view in views))) == 40


def test_settings_out_of_range_are_named():
    for inputs in (
        {"DATASET_MAPPER_NAME": "mine"},
        {"RANDOM_FLIP": "diagonal"},
        {"CROP": {"SINGLE_CATEGORY_MAX_AREA": 0.75}},
    ):
        cfg = config()
        cfg.INPUT.merge_from_other_cfg(type(cfg)(inputs))
        with pytest.raises(ConfigError, match=next(iter(inputs))):
            build_geometry(cfg)


def slowly_distorted(image_format, image, rng):
    """SSD's distortion without tables: every value is computed in float32."""

    def scaled(values, factor, shift):
        return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    contrast_first, *chosen = rng.random(5) < 0.5
    shift = rng.uniform(-32, 32)
    contrast, saturation = rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    hue = int(rng.integers(-18, 18, endpoint=True))
    if chosen[0]:
        image = scaled(image, 1, shift)
    if chosen[1] and contrast_first:
        image = scaled(image, contrast, 0)
    hsv = cv2.cvtColor(image, getattr(cv2, f"COLOR_{image_format}2HSV"))
    if chosen[2]:
        hsv[..., 1] = scaled(hsv[..., 1], saturation, 0)
    if chosen[3]:
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
    if chosen[2] or chosen[3]:
        image = cv2.cvtColor(hsv, getattr(cv2, f"COLOR_HSV2{image_format}"))
    return scaled(image, contrast, 0) if chosen[1] and not contrast_first else image


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_tables_of_levels_give_every_value_exactly(image_format):
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    image.flags.writeable = False
    distort = ColorDistortion(image_format)
    for seed in range(100):
        expected = slowly_distorted(image_format, image, np.random.default_rng(seed))
        assert np.array_equal(distort(image, np.random.default_rng(seed)), expected)
