import itertools

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils

from s4m_d2.errors import InputError
from s4m_d2.sepl.drawing import (
    FILL_ALPHA,
    LONG_SIDE,
    STRIPE_COLORS,
    WHITE_SHARE,
    draw_image,
    draw_label,
    draw_masks,
    legend_entries,
)

GRAY = 100
FADED = round(GRAY + WHITE_SHARE * (255 - GRAY))
# VOC's colors, as its development kit lists them.
AEROPLANE, BICYCLE, PERSON = (128, 0, 0), (0, 128, 0), (192, 128, 128)


def gray(height, width):
    return np.full((height, width, 3), GRAY, dtype=np.uint8)


def blended(color):
    return np.array(color) * FILL_ALPHA + FADED * (1 - FILL_ALPHA)


def encoded(masks):
    return [mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (480, LONG_SIDE)),
        ((500, 375), (LONG_SIDE, 480)),
        ((64, 128), (320, LONG_SIDE)),
        ((1024, 2048), (320, LONG_SIDE)),
        ((1, 2000), (1, LONG_SIDE)),
    ],
)
def test_pictures_of_an_image_have_one_size_whatever_they_show(size, expected):
    image, mask = gray(*size), np.zeros(size, dtype=bool)
    pictures = [
        draw_image(image),
        draw_label(image, np.zeros(size, np.uint8)),
        draw_masks(image, encoded([mask])),
        draw_masks(image, []),
    ]
    assert [picture.shape for picture in pictures] == [(*expected, 3)] * 4
    assert all(picture.dtype == np.uint8 for picture in pictures)


def test_classes_have_vocs_colors_over_a_faded_image():
    label = np.zeros((120, 160), np.uint8)
    label[:40, :40], label[:40, 80:], label[80:, :] = 1, 2, 15
    drawn = draw_label(gray(120, 160), label).astype(int)
    for place, color in (((20, 20), AEROPLANE), ((20, 120), BICYCLE), ((100, 80), PERSON)):
        y, x = (4 * value for value in place)
        assert np.abs(drawn[y, x] - blended(color)).max() <= 1
    assert (drawn[4 * 60, 4 * 60] == FADED).all()  # background
    assert (drawn[4 * 20, 4 * 40 - 1] == AEROPLANE).all()  # its border


def test_void_is_striped_and_nothing_else_looks_like_it():
    label = np.zeros((120, 160), np.uint8)
    label[:, 40:80], label[:, 120:] = 255, 1
    drawn = draw_label(gray(120, 160), label)
    is_stripe = (drawn[..., None, :] == np.array(STRIPE_COLORS)).all(-1).any(-1)
    assert is_stripe[:, 160:320].all()
    assert not is_stripe[:, :160].any() and not is_stripe[:, 320:].any()
    shares = [(drawn[:, 160:320] == color).all(-1).mean() for color in STRIPE_COLORS]
    np.testing.assert_allclose(shares, 0.5, atol=0.02)


def test_inputs_stay_as_they_are():
    image, label = gray(120, 640), np.ones((120, 640), np.uint8)  # no resizing, so no copy by it
    draw_label(image, label)
    draw_masks(image, encoded([label]))
    assert (image == GRAY).all() and (label == 1).all()


def test_a_mask_within_another_is_seen_whatever_their_order():
    outer, inner = np.zeros((2, 120, 160), bool)
    outer[10:110, 10:150], inner[50:70, 60:100] = True, True
    free = (np.array(draw_masks(gray(120, 160), []))).astype(int)
    for masks in ([outer, inner], [inner, outer]):
        drawn = draw_masks(gray(120, 160), encoded(masks)).astype(int)
        of_outer, of_inner = drawn[4 * 20, 4 * 20], drawn[4 * 60, 4 * 80]
        assert np.abs(of_outer - of_inner).max() > 40
        assert (drawn[4 * 2, 4 * 2] == free[4 * 2, 4 * 2]).all()
        assert np.abs(of_outer - free[0, 0]).max() > 40


@pytest.mark.parametrize("size", [(90, 90), (1500, 1100)])
def test_masks_side_by_side_differ_in_color(size):
    tiles = []
    for row, column in itertools.product(range(3), range(3)):
        tile = np.zeros((3, 3), np.uint8)
        tile[row, column] = 1
        whole = cv2.resize(tile, size[::-1], interpolation=cv2.INTER_NEAREST)
        tiles.append(whole)
    drawn = draw_masks(gray(*size), encoded(tiles)).astype(int)
    height, width = drawn.shape[:2]
    centers = drawn[height // 6 :: height // 3, width // 6 :: width // 3][:3, :3]
    for one, other in itertools.combinations(itertools.product(range(3), range(3)), 2):
        if max(abs(a - b) for a, b in zip(one, other, strict=True)) == 1:
            assert np.abs(centers[one] - centers[other]).max() > 20


def test_the_legend_names_what_occurs_with_its_color():
    names = ["background", *(f"class {index}" for index in range(1, 21))]
    labels = [np.array([[0, 15]], np.uint8), np.array([[2, 255], [2, 0]], np.uint8)]
    entries = legend_entries(labels, names)
    assert [name for name, _ in entries] == ["class 2", "class 15", "void"]
    for (_, swatch), color in zip(entries, (BICYCLE, PERSON), strict=False):
        assert (swatch == color).all()
    assert {tuple(color) for color in entries[-1][1].reshape(-1, 3)} == set(STRIPE_COLORS)
    assert legend_entries([np.zeros((2, 2), np.uint8)], names) == []


def test_disagreeing_arguments_are_named():
    with pytest.raises(InputError, match=r"label must be \(4, 5\) uint8 like the image.*\(4, 4\)"):
        draw_label(gray(4, 5), np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match="got .*int64"):
        draw_label(gray(4, 5), np.zeros((4, 5), np.int64))
    with pytest.raises(InputError, match=r"image must be \(H, W, 3\) uint8, got \(4, 5\)"):
        draw_image(np.zeros((4, 5), np.uint8))
