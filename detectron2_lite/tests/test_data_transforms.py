"""Transforms and augmentations against hand-computed results."""

import numpy as np
import pytest
from detectron2.data import transforms as T


def _ramp(height, width, dtype=np.uint8):
    return np.arange(height * width).reshape(height, width).astype(dtype)


@pytest.mark.parametrize(
    "old, short, longest, expected",
    [
        ((100, 200), 50, 1000, (50, 100)),
        ((200, 100), 50, 1000, (100, 50)),
        ((100, 200), 50, 80, (40, 80)),  # the longer edge decides
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67 rounds up
        ((3, 7), 2, 100, (2, 5)),  # 4.67 rounds up
        ((4, 9), 2, 100, (2, 5)),  # 4.5 rounds half up
    ],
)
def test_shortest_edge_output_shape(old, short, longest, expected):
    assert T.ResizeShortestEdge.get_output_shape(*old, short, longest) == expected
    resize = T.ResizeShortestEdge(short, longest).get_transform(np.zeros((*old, 3), np.uint8))
    assert (resize.new_h, resize.new_w) == expected


def test_shortest_edge_draws_from_the_closed_range_or_from_the_choices():
    image = np.zeros((10, 20), np.uint8)
    for augmentation, options in [
        (T.ResizeShortestEdge((5, 8)), {5, 6, 7, 8}),
        (T.ResizeShortestEdge([4, 9], sample_style="choice"), {4, 9}),
    ]:
        np.random.seed(0)
        assert {augmentation.get_transform(image).new_h for _ in range(60)} == options


def test_resize_keeps_the_type_and_uses_nearest_for_labels():
    transform = T.ResizeTransform(2, 2, 4, 4)
    labels = np.array([[0, 7], [9, 255]], np.uint8)
    expected = np.repeat(np.repeat(labels, 2, axis=0), 2, axis=1)
    np.testing.assert_array_equal(transform.apply_segmentation(labels), expected)
    assert transform.apply_image(labels[:, :, None]).shape == (4, 4, 1)
    assert transform.apply_image(np.stack([labels] * 3, axis=2)).shape == (4, 4, 3)
    ramp = transform.apply_image(np.array([[0, 1], [0, 1]], np.float32))
    assert ramp.dtype == np.float32
    np.testing.assert_allclose(ramp, np.tile([0, 0.25, 0.75, 1], (4, 1)))  # half-pixel centers
    assert transform.apply_image(labels[:, ::-1]).dtype == np.uint8
    with pytest.raises(AssertionError):
        transform.apply_image(np.zeros((3, 2), np.uint8))


def test_resize_scales_coordinates():
    transform = T.ResizeTransform(10, 20, 5, 40)
    points = np.array([[0.0, 0.0], [20.0, 10.0], [5.0, 4.0]])
    moved = transform.apply_coords(points.copy())
    np.testing.assert_allclose(moved, [[0, 0], [40, 5], [10, 2]])


def test_flip_is_applied_with_its_probability_and_to_the_chosen_axis():
    image = _ramp(2, 3)
    view = T.AugInput(image, boxes=np.array([[0.0, 0.0, 1.0, 2.0]]), sem_seg=image)
    transform = T.RandomFlip(prob=1.0)(view)
    np.testing.assert_array_equal(view.image, image[:, ::-1])
    np.testing.assert_array_equal(view.sem_seg, image[:, ::-1])
    np.testing.assert_allclose(view.boxes, [[2, 0, 3, 2]])
    assert isinstance(transform, T.HFlipTransform)
    vertical = T.RandomFlip(prob=1.0, horizontal=False, vertical=True).get_transform(image)
    np.testing.assert_array_equal(vertical.apply_image(image), image[::-1])
    assert isinstance(T.RandomFlip(prob=0.0).get_transform(image), T.NoOpTransform)
    for horizontal in (True, False):
        with pytest.raises(ValueError):
            T.RandomFlip(horizontal=horizontal, vertical=horizontal)


@pytest.mark.parametrize(
    "kind, size, expected",
    [
        ("absolute", (4, 6), (4, 6)),
        ("absolute", (400, 6), (10, 6)),
        ("relative", (0.5, 0.25), (5, 5)),
        ("absolute_range", (3, 3), (3, 3)),
        ("relative_range", (1.0, 1.0), (10, 20)),
    ],
)
def test_random_crop_size(kind, size, expected):
    assert T.RandomCrop(kind, size).get_crop_size((10, 20)) == expected


def test_random_crop_draws_its_size_before_its_position():
    np.random.seed(5)
    crop = T.RandomCrop("relative_range", (0.2, 0.4)).get_transform(np.zeros((10, 20, 3)))
    np.random.seed(5)
    height, width = np.random.rand(2) * [0.8, 0.6] + [0.2, 0.4]
    height, width = int(height * 10 + 0.5), int(width * 20 + 0.5)
    y0, x0 = np.random.randint(10 - height + 1), np.random.randint(20 - width + 1)
    assert (crop.x0, crop.y0, crop.w, crop.h) == (x0, y0, width, height)


def test_resize_scale_fits_the_scaled_target_and_keeps_the_aspect_ratio():
    np.random.seed(2)
    resize = T.ResizeScale(0.5, 2.0, 40, 40).get_transform(np.zeros((10, 30), np.uint8))
    np.random.seed(2)
    side = 40 * np.random.uniform(0.5, 2.0)  # the wider edge becomes this long
    assert (resize.new_h, resize.new_w) == (round(side / 3), round(side))


def test_fixed_size_crop_shares_one_draw_between_the_axes_and_pads_right_and_bottom():
    image = _ramp(8, 4)
    np.random.seed(1)
    transform = T.FixedSizeCrop((6, 6), pad_value=200, seg_pad_value=9).get_transform(image)
    np.random.seed(1)
    y0 = int(np.round(2 * np.random.uniform(0.0, 1.0)))
    for apply, fill in [(transform.apply_image, 200), (transform.apply_segmentation, 9)]:
        expected = np.full((6, 6), fill, np.uint8)
        expected[:, :4] = image[y0 : y0 + 6]
        np.testing.assert_array_equal(apply(image), expected)
    small = T.FixedSizeCrop((6, 6), pad=False).get_transform(image).apply_image(image)
    assert small.shape == (6, 4)


def test_a_list_passes_each_policy_what_the_former_one_made():
    class Shape(T.Augmentation):
        def get_transform(self, image, boxes):
            seen.append((image.shape, boxes.tolist()))
            return T.NoOpTransform()

    seen = []
    view = T.AugInput(np.zeros((4, 8, 3), np.uint8), boxes=np.array([[0.0, 0.0, 8.0, 4.0]]))
    augmentations = T.AugmentationList([Shape(), T.ResizeTransform(4, 8, 2, 2), Shape()])
    transforms = augmentations(view)
    assert seen == [((4, 8, 3), [[0, 0, 8, 4]]), ((2, 2, 3), [[0, 0, 2, 2]])]
    np.testing.assert_allclose(transforms.apply_coords(np.array([[8.0, 4.0]])), [[2, 2]])


def test_a_policy_that_needs_what_the_input_lacks_says_so():
    class NeedsDepth(T.Augmentation):
        def get_transform(self, image, depth):
            return T.NoOpTransform()

    with pytest.raises(AttributeError, match="depth"):
        NeedsDepth()(T.AugInput(np.zeros((2, 2), np.uint8)))


def test_repr_names_what_differs_from_the_defaults():
    assert repr(T.RandomFlip(prob=0.3)) == "RandomFlip(prob=0.3)"
    assert str(T.RandomFlip()) == "RandomFlip()"
