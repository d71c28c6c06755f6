"""Only what a crop keeps is computed: pixels and masks are those of Detectron2's transforms."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from s4m_d2.data.cropping import draw_transforms, source_pixels, transform_image
from s4m_d2.data.masks import tight_boxes, transform_masks
from s4m_d2.data.run_lengths import RunLengths
from s4m_d2.data.transforms import apply_geometry, seeded_numpy

GEOMETRIES = {
    "Cityscapes": [
        T.ResizeShortestEdge((20, 31, 47, 90, 130), 300, "choice"),
        T.RandomCrop("absolute", (25, 50)),
        T.RandomFlip(),
    ],
    "COCO": [
        T.RandomFlip(),
        T.ResizeScale(0.1, 3.0, 70, 70),
        T.FixedSizeCrop((70, 70), pad=False),
    ],
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
    "nothing": [],
}


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
@given(
    size=st.tuples(st.integers(12, 90), st.integers(12, 90)),
    seed=st.integers(0, 2**31),
)
def test_views_and_masks_are_those_of_whole_images(name, size, seed):
    image = noise(*size, seed)
    view, transforms = apply_geometry(GEOMETRIES[name], image, seed)
    expected, slow = detectron2_s(GEOMETRIES[name], image, seed)
    assert described(transforms.transforms) == described(slow.transforms)
    assert np.array_equal(view, expected)

    labels = noise(*size, seed + 1)[..., 0]
    rows, columns = source_pixels(transforms, size)
    assert np.array_equal(labels[rows][:, columns], slow.apply_segmentation(labels))


@pytest.mark.parametrize("new_size", [(512, 1024), (614, 1228), (1331, 2662), (2048, 4096)])
@pytest.mark.parametrize("corner", ["first", "middle", "last"])
def test_crops_of_cityscapes_size_are_exact_up_to_the_borders(new_size, corner):
    image = np.tile(noise(256, 512), (4, 4, 1))
    room = new_size[0] - 512, new_size[1] - 1024
    y, x = {"first": (0, 0), "middle": (room[0] // 3, room[1] // 2), "last": room}[corner]
    transforms = T.TransformList(
        [T.ResizeTransform(1024, 2048, *new_size), T.CropTransform(x, y, 1024, 512)]
    )
    assert np.array_equal(transform_image(image, transforms), transforms.apply_image(image))


class Grayer(T.Augmentation):
    """A foreign augmentation that looks at the pixels."""

    def get_transform(self, image):
        return T.CropTransform(0, 0, 5 + int(image.mean()) % 7, 9)


class MyResize(T.ResizeScale):
    def get_transform(self, image):
        assert image.any()  # sees the image itself
        return super().get_transform(image)


@pytest.mark.parametrize(
    "foreign", [Grayer(), MyResize(0.5, 2.0, 40, 40), T.FixedSizeCrop((99, 99))]
)
def test_other_augmentations_see_the_image(foreign):
    image = noise(40, 60)
    augmentations = [*GEOMETRIES["Cityscapes"], foreign]
    assert draw_transforms(augmentations, (40, 60)) is None
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


@pytest.mark.parametrize("kind", ["array", "text", "counts"])
@pytest.mark.parametrize("padded", [False, True], ids=["known", "foreign"])
@pytest.mark.parametrize("name", ["Cityscapes", "COCO", "vertical"])
def test_masks_are_resampled_as_each_alone(name, padded, kind):
    size = (41, 67)
    for seed in range(6):
        _, transforms = detectron2_s(GEOMETRIES[name], noise(*size), seed)
        view_size = transforms.apply_image(noise(*size)).shape[:2]
        if padded:  # a transform that is not known to take source pixels
            transforms = transforms + T.TransformList([T.PadTransform(1, 2, 3, 4)])
            view_size = view_size[0] + 6, view_size[1] + 4
        masks = shapes(size, seed)
        given_as = list(masks) if kind == "array" else [as_rle(m, kind == "text") for m in masks]
        moved = transform_masks(given_as, transforms, size, view_size)
        expected = [transforms.apply_segmentation(m.astype(np.uint8)) for m in masks]
        assert np.array_equal(moved.numpy(), np.stack(expected).astype(bool))


@given(
    runs=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    height=st.integers(1, 9),
    span=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_run_lengths_are_decoded_as_coco_s_api_does(runs, height, span):
    runs[-1] += -sum(runs) % height or (height if not sum(runs) else 0)
    width = sum(runs) // height
    mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    lengths = RunLengths(np.array(runs), height)
    start, stop = sorted(min(edge, width) for edge in span)
    assert np.array_equal(lengths.columns(start, stop), mask[:, start:stop])
    rows, columns = lengths.bounds()
    outside = mask.copy()
    outside[rows, columns] = False
    assert not outside.any()
    if mask.any():
        set_columns = np.flatnonzero(mask.any(0))
        assert (columns.start, columns.stop) == (set_columns[0], set_columns[-1] + 1)
    else:
        assert not mask[rows, columns].size


def test_polygons_are_drawn_as_coco_s_api_draws_them_in_the_whole_view():
    size = (60, 80)
    rng = np.random.default_rng(3)
    for seed in range(10):
        view, transforms = detectron2_s(GEOMETRIES["COCO"], noise(*size), seed)
        polygons = [rng.uniform(-10, 90, 2 * n) for n in (3, 5, 12)]
        moved = transform_masks([[p] for p in polygons] + [polygons], transforms, size,
                                view.shape[:2])  # fmt: skip
        drawn = [transforms.apply_coords(p.copy().reshape(-1, 2)).reshape(-1) for p in polygons]
        rles = mask_util.frPyObjects(drawn, *view.shape[:2])
        expected = [mask_util.decode(rle) for rle in (*rles, mask_util.merge(rles))]
        assert np.array_equal(moved.numpy(), np.stack(expected).astype(bool))


def test_boxes_are_tight():
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[2, 1, 8] = masks[2, 5, 0] = True
    assert tight_boxes(masks).tolist() == [[3, 2, 4, 3], [0, 0, 0, 0], [0, 1, 9, 6]]
    assert tight_boxes(masks[:0]).shape == (0, 4)
