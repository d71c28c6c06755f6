import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from s4m_d2.errors import InputError
from s4m_d2.structures import RLEMasks, encode_masks
from s4m_d2.visualization import (
    FILL_ALPHA,
    instance_colors,
    overlay,
    panel_figure,
    panel_grid,
)

NAMES = ["person", "car"]


def boxes(size, corners):
    """Masks that are rectangles (y0, x0, y1, x1)."""
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def gray(height, width):
    return np.full((height, width, 3), 128, dtype=np.uint8)


@pytest.mark.parametrize(("size", "expected"), [((128, 256), (384, 768)), ((400, 500), (400, 500))])
def test_small_images_are_enlarged_until_names_are_readable(size, expected):
    masks = boxes(size, [(10, 10, 60, 60)])
    assert overlay(gray(*size), masks, [1], NAMES).shape == (*expected, 3)
    assert overlay(gray(*size), masks[:0], [], NAMES).shape == (*expected, 3)


def test_pixels_change_only_where_instances_and_names_are():
    masks = boxes((320, 400), [(100, 100, 200, 250)])
    drawn = overlay(gray(320, 400), masks, [1], NAMES, scores=[0.5], scale=1)
    changed = (drawn != 128).any(2)
    assert changed[masks[0].numpy()].mean() > 0.99  # a pixel of a letter's edge may be gray
    near = torch.nn.functional.max_pool2d(masks.float(), 7, 1, 3)[0].bool().numpy()
    assert not changed[~near].any()


def test_a_pixel_of_several_instances_has_the_color_of_the_smallest():
    corners = [(40, 40, 300, 360), (60, 60, 120, 120), (40, 40, 300, 360)]
    masks = boxes((320, 400), corners)
    colors = np.array(instance_colors(masks))
    drawn = overlay(gray(320, 400), masks, [0, 1, 1], NAMES, scale=1)
    expected = 128 * (1 - FILL_ALPHA) + colors * FILL_ALPHA
    assert np.abs(drawn[70, 70] - expected[1]).max() <= 1
    assert np.abs(drawn[280, 60] - expected[0]).max() <= 1  # of equals the first


def test_the_name_is_written_and_the_score_makes_a_difference():
    masks = boxes((320, 400), [(100, 100, 200, 250)])
    pictures = [
        overlay(gray(320, 400), masks, label, NAMES, scores)
        for label, scores in (([0], None), ([1], None), ([1], [0.5]), ([1], [0.6]))
    ]
    for one, other in itertools.combinations(pictures, 2):
        assert (one != other).any()


def test_inputs_stay_as_they_are_and_encoded_masks_are_drawn_alike():
    image, masks = gray(320, 400), boxes((320, 400), [(0, 0, 320, 400), (9, 9, 9, 9)])
    drawn = overlay(image, masks, [0, 1], NAMES)
    assert (image == 128).all() and masks[0].all()
    encoded = RLEMasks(encode_masks(masks), (320, 400))
    assert (overlay(image, encoded, [0, 1], NAMES) == drawn).all()


def test_names_of_too_many_instances_would_hide_them():
    corners = [(y, x, y + 20, x + 20) for y in range(0, 320, 40) for x in range(0, 400, 40)]
    drawn = [
        overlay(gray(320, 400), boxes((320, 400), corners[:count]), [label] * count, NAMES)
        for count in (60, 61)
        for label in (0, 1)
    ]
    assert (drawn[0] != drawn[1]).any() and (drawn[2] == drawn[3]).all()


@given(
    st.lists(
        st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 30)] * 2), min_size=1, max_size=16
    )
)
def test_touching_instances_have_different_colors(corners):
    masks = boxes((48, 48), [(y, x, y + h, x + w) for y, x, h, w in corners])
    colors = instance_colors(masks)
    grown = torch.nn.functional.max_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0].bool()
    for i, j in itertools.combinations(range(len(masks)), 2):
        if (grown[i] & masks[j]).any():
            assert colors[i] != colors[j]


def test_even_a_crowd_at_one_place_has_a_color_each():
    colors = instance_colors(torch.ones(40, 20, 20, dtype=torch.bool))
    assert len(set(colors)) == 40


@pytest.mark.parametrize(
    ("image", "masks", "labels", "scores", "message"),
    [
        (np.zeros((4, 4, 3)), torch.zeros(0, 4, 4).bool(), [], None, "uint8"),
        (gray(4, 4), torch.zeros(1, 4, 5).bool(), [0], None, r"\(N, 4, 4\) bool"),
        (gray(4, 4), torch.zeros(1, 4, 4), [0], None, "float32"),
        (gray(4, 4), torch.zeros(1, 4, 4).bool(), [], None, "1 masks need as many labels"),
        (gray(4, 4), torch.zeros(1, 4, 4).bool(), [0], [], "and scores"),
    ],
)
def test_disagreeing_arguments_are_named(image, masks, labels, scores, message):
    with pytest.raises(InputError, match=message):
        overlay(image, masks, labels, NAMES, scores)


def test_the_grid_has_a_row_for_each_image_and_a_column_for_each_title(tmp_path):
    red, blue = gray(64, 128), gray(64, 128)
    red[:] = 255, 0, 0
    blue[:] = 0, 0, 255
    path = tmp_path / "new" / "overview.png"
    panel_grid([[red, blue, None], [blue, None, red]], ["one", "two", "three"], path)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    top = height - width / 3 * 64 / 128 * 2  # titles above
    expected = [["red", "blue", "white"], ["blue", "white", "red"]]
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    for row, column in itertools.product(range(2), range(3)):
        y = int(top + (row + 0.5) * (height - top) / 2)
        x = int((column + 0.5) * width / 3)
        assert np.abs(picture[y, x] - colors[expected[row][column]]).max() < 8
    assert [entry.name for entry in path.parent.iterdir()] == ["overview.png"]


@pytest.mark.parametrize("rows", [[], [[None, None]], [[gray(4, 4)]]])
def test_a_grid_needs_pictures_that_fit_its_titles(tmp_path, rows):
    with pytest.raises(InputError, match="2 column titles"):
        panel_grid(rows, ["one", "two"], tmp_path / "overview.png")


def text_boxes(figure):
    """Text → (left, bottom, right, top) in pixels."""
    return {text.get_text(): text.get_window_extent().extents for text in figure.texts}


def overlap(one, other):
    return max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(
        one[3], other[3]
    )


def test_row_titles_and_a_legend_find_a_place_each():
    rows = [[gray(375, 500), gray(375, 500)], [gray(500, 375), None], [gray(100, 500)] * 2]
    titles = ["2007_000032 $a{$", "long_" * 60 + "end", "third"]
    names = [f"class {'w' * (index % 30)}{index}" for index in range(23)]
    legend = [(name, gray(20, 32)) for name in names]
    figure = panel_figure(rows, ["one", "two"], titles, legend)
    boxes_of_texts = text_boxes(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert len(boxes_of_texts) == 2 + 3 + 23
    assert set(boxes_of_texts) >= {"one", "two", titles[0], "third", *names}
    shortened = next(text for text in boxes_of_texts if text.startswith("long_"))
    assert "…" in shortened and shortened.endswith("_end")
    pictures = [cell.get_window_extent().extents for cell in figure.axes]
    for left, bottom, right, top in [*boxes_of_texts.values(), *pictures]:
        assert left >= 0 and bottom >= 0 and right <= width and top <= height
    for one, other in itertools.combinations([*boxes_of_texts.values(), *pictures], 2):
        assert not overlap(one, other)


def test_each_row_is_as_high_as_its_own_pictures():
    rows = [[gray(100, 400)], [gray(200, 400)], [gray(900, 300)]]
    low, middle, high = (
        cell.get_window_extent() for cell in panel_figure(rows, ["one"]).axes
    )  # as drawn: keeping the aspect
    assert low.y0 > middle.y1 > middle.y0 > high.y1
    for cell, aspect in ((low, 0.25), (middle, 0.5)):
        assert cell.height / cell.width == pytest.approx(aspect, rel=1e-6)
    assert high.height == pytest.approx(high.width, rel=1e-6), "its cell: at most a square"


def test_a_swatch_of_the_legend_lies_before_its_name(tmp_path):
    green = np.full((20, 32, 3), (0, 128, 0), dtype=np.uint8)
    path = tmp_path / "overview.png"
    panel_grid([[gray(50, 100)]], ["one"], path, legend=[("grass", green), ("dust", gray(20, 32))])
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    found = panel_figure([[gray(50, 100)]], ["one"], legend=[("grass", green), ("dust", green)])
    left, bottom, _, top = text_boxes(found)["grass"]
    y, x = picture.shape[0] - round((bottom + top) / 2), round(left) - 20
    assert picture[y, x].tolist() == [0, 128, 0]


def test_titles_must_be_as_many_as_rows_and_rows_must_fit():
    with pytest.raises(InputError, match="2 rows need as many titles, got 1"):
        panel_figure([[gray(4, 4)]] * 2, ["one"], ["a"])
    with pytest.raises(InputError, match="400 rows do not fit into one picture"):
        panel_figure([[gray(4, 4)]] * 400, ["one"])
