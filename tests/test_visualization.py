"""Pictures of known pixels: instances, numbers as colors, grids, videos."""

import itertools

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from s4m_d2.errors import OutputError
from s4m_d2.structures import mask_boxes
from s4m_d2.visualization import (
    FILL_ALPHA,
    ColorScale,
    Panels,
    box_colors,
    heat_map,
    mark_point,
    outline,
    overlay,
    panel_grid,
    write_video,
)

NAMES = ["person", "car"]
SCALE = ColorScale(-1.0, 1.0, "cosine")


def boxes(size, corners):
    """Masks that are rectangles (y0, x0, y1, x1)."""
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def instance_colors(masks):
    return box_colors(mask_boxes(masks).numpy(), masks.shape[1:])


def gray(height, width, level=128):
    return np.full((height, width, 3), level, dtype=np.uint8)


def color(value):
    return np.array(matplotlib.colormaps["viridis"]((value + 1) / 2, bytes=True)[:3])


def test_pixels_change_only_where_instances_and_names_are():
    image, masks = gray(320, 400), boxes((320, 400), [(100, 100, 200, 250)])
    variants = (([0], None), ([1], None), ([1], [0.5]), ([1], [0.6]))
    pictures = [overlay(image, masks, label, NAMES, scores) for label, scores in variants]
    near = torch.nn.functional.max_pool2d(masks.float(), 7, 1, 3)[0].bool().numpy()
    for drawn in pictures:
        changed = (drawn != 128).any(2)
        assert changed[masks[0].numpy()].mean() > 0.99  # a pixel of a letter's edge may be gray
        assert not changed[~near].any()
    for one, other in itertools.combinations(pictures, 2):  # names and scores are written
        assert (one != other).any()
    assert (image == 128).all()


def test_a_pixel_of_several_instances_has_the_color_of_the_smallest():
    masks = boxes((320, 400), [(40, 40, 300, 360), (60, 60, 120, 120), (40, 40, 300, 360)])
    colors = np.array(instance_colors(masks))
    drawn = overlay(gray(320, 400), masks, [0, 1, 1], NAMES)
    expected = 128 * (1 - FILL_ALPHA) + colors * FILL_ALPHA
    assert np.abs(drawn[70, 70] - expected[1]).max() <= 1
    assert np.abs(drawn[280, 60] - expected[0]).max() <= 1  # of equals the first


def test_names_of_too_many_instances_would_hide_them():
    corners = [(y, x, y + 20, x + 20) for y in range(0, 320, 40) for x in range(0, 400, 40)]
    image, masks = gray(320, 400), boxes((320, 400), corners)
    pairs = itertools.product((60, 61), (0, 1))
    drawn = [overlay(image, masks[:count], [label] * count, NAMES) for count, label in pairs]
    assert (drawn[0] != drawn[1]).any() and (drawn[2] == drawn[3]).all()


def test_the_name_of_the_only_class_is_not_written():
    image, masks = gray(320, 400), boxes((320, 400), [(100, 100, 200, 250)])
    ant, bee = (overlay(image, masks, [0], [name]) for name in NAMES)
    assert (ant == bee).all() and (ant != overlay(image, masks, [0], ["ant"], [0.5])).any()


@settings(max_examples=30)
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


def test_cells_have_their_own_color_at_their_centers_and_a_mean_between():
    values = np.array([[-1.0, 0.0], [0.5, 7.0]])  # beyond the scale: its last color
    picture = heat_map(values, (22, 42), SCALE)  # 11 x 21 px a cell
    for row, column in np.ndindex(2, 2):
        expected = color(min(values[row, column], 1.0))
        assert (picture[11 * row + 5, 21 * column + 10] == expected).all()
    assert (picture[0, 0] == color(-1.0)).all() and (picture[-1, -1] == color(1.0)).all()
    middle = heat_map(values.clip(-1, 1), (22, 42), SCALE)[10:12, 20:22].reshape(-1, 3).mean(0)
    assert np.abs(middle - color(0.125)).max() <= 3
    wide = heat_map(values, (2, 40_000), SCALE)
    assert wide.shape == (2, 40_000, 3) and (wide[0, 0] == color(-1.0)).all()


def test_a_mark_is_a_ring_and_an_outline_follows_its_mask():
    picture = gray(280, 400)
    marked = mark_point(picture, (100, 50))
    assert (picture == 128).all() and (marked[50, 100] == 128).all()
    assert (marked[50, 110] == 255).all()  # radius 280 / 28
    y, x = np.nonzero((marked != 128).any(2))
    assert np.hypot(x - 100, y - 50).max() <= 14
    [mask] = boxes((20, 30), [(5, 10, 15, 20)]).numpy()
    drawn = outline(gray(80, 120), mask)
    changed = (drawn != 128).any(2)
    assert (drawn[40, 40] == 255).all()  # 4 * 10, the left edge
    assert not changed[30:50, 50:70].any() and not changed[:14].any() and not changed[:, :34].any()


def test_the_grid_has_a_row_for_each_image_and_a_column_for_each_title(tmp_path):
    red, blue = gray(64, 128), gray(64, 128)
    red[:], blue[:] = (255, 0, 0), (0, 0, 255)
    path = tmp_path / "new" / "overview.png"
    rows = [[red, blue, None, None], [blue, None, None, red]]
    panel_grid(rows, ["one", "two", "left out", "three"], path)
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


def test_a_title_longer_than_its_room_stays_in_the_picture():
    picture = Panels(["one"], [[gray(375, 500)]], ["long_" * 60 + "end"]).draw()
    assert (picture[:, :4] == 255).all() and (picture[:, -4:] == 255).all()


def test_a_video_has_its_frames_in_order_and_colors_and_even_sides(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    levels = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    with write_video(path, 12.5) as write:
        for level in levels:
            write(np.full((63, 95, 3), level, dtype=np.uint8))
        assert not path.exists(), "not before it is complete"
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    for level in levels:
        frame = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
        assert frame.shape == (64, 96, 3)
        assert np.abs(frame.reshape(-1, 3).mean(0) - level).max() < 6
        assert np.abs(frame[-1].mean(0) - level).max() < 10, "the repeated line"
    assert not capture.read()[0]
    assert [entry.name for entry in path.parent.iterdir()] == ["a.mp4"]


def test_a_video_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(OutputError), write_video(path, 10) as write:
        write(gray(64, 64))
        write(gray(32, 64))
    with write_video(path, 10):
        pass  # no frame
    with pytest.raises(OutputError), write_video(path, 10) as write:
        write(gray(64, 64))
        monkeypatch.setattr(cv2, "copyMakeBorder", lambda *args: gray(4, 4))  # is dropped
        write(gray(64, 64))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
