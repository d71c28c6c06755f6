"""Numbers as colors, marks, color bars and videos: known pixels."""

import cv2
import matplotlib
import numpy as np
import pytest
from PIL import Image

from s4m_d2.errors import InputError, OutputError
from s4m_d2.visualization import (
    ColorScale,
    heat_map,
    mark_point,
    outline,
    panel_figure,
    rendered,
    write_png,
)
from s4m_d2.visualization.video import write_video

SCALE = ColorScale(-1.0, 1.0, "cosine")


def color(value):
    return np.array(matplotlib.colormaps["viridis"]((value + 1) / 2, bytes=True)[:3])


def gray(height, width, level=128):
    return np.full((height, width, 3), level, dtype=np.uint8)


def test_cells_have_their_own_color_at_their_centers_and_a_mean_between():
    values = np.array([[-1.0, 0.0], [0.5, 1.0]])
    picture = heat_map(values, (22, 42), SCALE)  # 11 x 21 px a cell
    for row, column in np.ndindex(2, 2):
        assert (picture[11 * row + 5, 21 * column + 10] == color(values[row, column])).all()
    assert (picture[0, 0] == color(-1.0)).all() and (picture[-1, -1] == color(1.0)).all()
    middle = picture[10:12, 20:22].reshape(-1, 3).mean(0)
    assert np.abs(middle - color(0.125)).max() <= 3


def test_a_picture_that_covers_part_of_a_cell_shows_no_more_of_it():
    values = np.array([[0.0, 0.0, 1.0]])
    picture = heat_map(values, (10, 200), SCALE, cells=(1.0, 2.0))
    assert (picture[:, :150] == color(0.0)).all()  # up to the second center
    assert np.abs(picture[0, -1].astype(int) - color(0.5)).max() <= 4  # half-way to the third
    wider = heat_map(values, (10, 350), SCALE, cells=(1.0, 3.5))
    assert (wider[:, 251:] == color(1.0)).all()  # the last goes on


def test_numbers_beyond_the_scale_have_its_last_colors():
    found = SCALE.colors(np.array([-7.0, 7.0]))
    assert (found == [color(-1.0), color(1.0)]).all()


@pytest.mark.parametrize("low", [1.0, 2.0, float("nan")])
def test_a_scale_needs_a_range(low):
    with pytest.raises(InputError, match="low < high"):
        ColorScale(low, 1.0)


def test_a_mark_is_a_ring_and_changes_nothing_else():
    picture = gray(280, 400)
    marked = mark_point(picture, (100, 50))
    assert (picture == 128).all()
    assert (marked[50, 100] == 128).all()
    assert (marked[50, 110] == 255).all()  # radius 280 / 28
    changed = (marked != 128).any(2)
    y, x = np.nonzero(changed)
    assert np.hypot(x - 100, y - 50).max() <= 14


def test_an_outline_follows_the_mask_on_the_enlarged_picture():
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:15, 10:20] = True
    drawn = outline(gray(80, 120), mask)
    changed = (drawn != 128).any(2)
    assert (drawn[40, 40] == 255).all()  # 4 * 10, the left edge
    assert not changed[30:50, 50:70].any() and not changed[:14].any() and not changed[:, :34].any()


def test_the_color_bar_has_the_scales_colors_from_left_to_right():
    figure = panel_figure([[gray(50, 100)] * 2], ["one", "two"], scale=SCALE, caption="a line")
    picture = rendered(figure)
    bar = figure.axes[-1].get_window_extent().extents
    y = picture.shape[0] - round((bar[1] + bar[3]) / 2)
    xs = np.linspace(bar[0] + 3, bar[2] - 3, 9)
    found = picture[y, xs.round().astype(int)].astype(int)
    expected = [color(value) for value in np.linspace(-1, 1, 9)]
    assert np.abs(found - expected).max() <= 12
    texts = {text.get_text(): text.get_window_extent().extents for text in figure.texts}
    assert texts["cosine"][2] <= bar[0], "left of it"
    assert texts["a line"][3] <= bar[1], "below it"
    assert bar[3] < figure.axes[0].get_window_extent().y0, "below the pictures"


def test_a_png_is_what_was_drawn(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    write_png(picture, tmp_path / "new" / "a.png")
    assert (np.asarray(Image.open(tmp_path / "new" / "a.png")) == picture).all()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        there, frame = capture.read()
        if not there:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def test_a_video_has_its_frames_in_order_and_colors_and_even_sides(tmp_path):
    path = tmp_path / "new" / "a.mp4"
    levels = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    with write_video(path, 12.5) as write:
        for level in levels:
            write(np.full((63, 95, 3), level, dtype=np.uint8))
        assert not path.exists(), "not before it is complete"
    frames, fps = read_video(path)
    assert fps == pytest.approx(12.5) and len(frames) == 3
    for frame, level in zip(frames, levels, strict=True):
        assert frame.shape == (64, 96, 3)
        assert np.abs(frame.reshape(-1, 3).mean(0) - level).max() < 6
        assert np.abs(frame[-1].mean(0) - level).max() < 10, "the repeated line"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.mp4"]


def test_a_video_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="are \\(64, 64\\), got \\(32, 64\\)"):
        with write_video(path, 10) as write:
            write(gray(64, 64))
            write(gray(32, 64))
    with write_video(path, 10):
        pass  # no frame
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_with_lost_frames_is_reported(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="1 of 2 frames arrived"):
        with write_video(tmp_path / "a.mp4", 10) as write:
            write(gray(64, 64))
            monkeypatch.setattr(cv2, "copyMakeBorder", lambda *args: gray(4, 4))  # is dropped
            write(gray(64, 64))
    assert not list(tmp_path.iterdir())


def test_a_video_is_named_mp4(tmp_path):
    with pytest.raises(InputError, match=r"a name in \.mp4"):
        with write_video(tmp_path / "a.avi", 10):
            pass
