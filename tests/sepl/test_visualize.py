"""Pictures of label maps and masks, and `s4m-sepl visualize` on folders."""

import numpy as np
import pytest
from sepl_folders import rle_of, save_labels, save_masks, save_png, sepl

from s4m_d2.sepl import results as module
from s4m_d2.sepl.results import FILL_ALPHA, WHITE_SHARE, draw_label, draw_masks

GRAY = 100
FADED = round(GRAY + WHITE_SHARE * (255 - GRAY))
# VOC's colors, as its development kit lists them.
AEROPLANE, BICYCLE, PERSON = (128, 0, 0), (0, 128, 0), (192, 128, 128)
VOID = (224, 224, 192)


def gray(height, width):
    return np.full((height, width, 3), GRAY, dtype=np.uint8)


def test_classes_and_void_have_vocs_colors_over_a_faded_image():
    label = np.zeros((120, 160), np.uint8)
    label[:40, :40], label[:40, 80:], label[80:, :80], label[80:, 80:] = 1, 2, 15, 255
    drawn = draw_label(gray(120, 160), label).astype(int)
    places = {(20, 20): AEROPLANE, (20, 120): BICYCLE, (100, 40): PERSON, (100, 120): VOID}
    for place, color in places.items():
        blended = np.array(color) * FILL_ALPHA + FADED * (1 - FILL_ALPHA)
        assert np.abs(drawn[place] - blended).max() <= 1
    assert (drawn[60, 60] == FADED).all()  # background


SIZE = 24, 40
TRUE_WIDTH = 20  # columns of class 1 in the ground truth
# By name: columns of class 1 before and after. By falling gain: a, b, c, d, e.
WIDTHS = {"c": (15, 15), "a": (0, 20), "e": (20, 2), "b": (10, 18), "d": (20, 16)}


def label(columns, index=1):
    values = np.zeros(SIZE, np.uint8)
    values[:, :columns] = index
    return values


@pytest.fixture
def folders(tmp_path):
    for name, (before, after) in WIDTHS.items():
        save_png(tmp_path / "images" / f"{name}.png", np.full((*SIZE, 3), GRAY))
        save_labels(tmp_path / "cam", {name: label(before)})
        save_labels(tmp_path / "sepl", {name: label(after)})
        save_labels(tmp_path / "truth", {name: label(TRUE_WIDTH)})
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """What is to be drawn; nothing is."""
    calls = {}

    def note(rows, column_titles, path, row_titles, legend):
        assert len(rows[0]) == len(column_titles) == 5
        names = [title.split()[0] for title in row_titles]
        calls.update(rows=rows, titles=row_titles, names=names)

    monkeypatch.setattr(module, "panel_grid", note)
    return calls


def visualize(folders, *words, truth=True):
    given = ["--images", folders / "images", "--pseudo-labels", folders / "cam"]
    given += ["--enhanced", folders / "sepl", "--output", folders / "out" / "picture.png"]
    given += ["--ground-truth", folders / "truth"] if truth else []
    return sepl("visualize", *given, *words)


def test_options_choose_the_images(folders, drawn):
    for words, names in (
        ([], "abcde"),
        (["--best", 2], "ab"),
        (["--worst", 2], "de"),
        (["--best", 1, "--worst", 1], "ae"),
        (["--names", "e", "b", "e"], "eb"),
        (["--count", 2], "ac"),
        (["--count", 99], "abcde"),
        (["--names", "d", "--worst", 1, "--count", 1], "dae"),
    ):
        assert visualize(folders, *words) == 0
        assert drawn["names"] == list(names)
        if "a" in names:  # IoU of class 1 is 0, of background 20 / 40
            assert drawn["titles"][names.index("a")].endswith("25.0 → 100.0 (+75.0)")


def test_every_picture_stands_in_its_column(folders, drawn):
    save_masks(folders / "sepl" / "masks", {"b": [label(7)]})
    assert visualize(folders, "--names", "b") == 0
    image = np.full((*SIZE, 3), GRAY, np.uint8)
    expected = [image, draw_label(image, label(10))]
    expected += [draw_masks(image, [rle_of(label(7))]), draw_label(image, label(18))]
    expected += [draw_label(image, label(TRUE_WIDTH))]
    for picture, other in zip(drawn["rows"][0], expected, strict=True):
        np.testing.assert_array_equal(picture, other)


def test_images_that_cannot_be_drawn_are_named_and_the_others_are_drawn(folders, drawn, capsys):
    (folders / "images/b.png").write_bytes(b"\x89PNG")
    save_png(folders / "images/d.png", np.zeros((24, 50, 3)))
    save_masks(folders / "masks", {**dict.fromkeys("ac", [label(7)]), "e": [np.zeros((5, 5))]})
    masks = ("--masks", folders / "masks")
    assert visualize(folders, *masks) == 1
    assert drawn["names"] == ["a", "c"]
    said = capsys.readouterr().err
    assert all(f"\n  {name}: " in said for name in "bde")
    save_labels(folders / "cam", {"a": label(4, 99)})
    assert visualize(folders, *masks, "--best", 2) == 1 and drawn["names"] == ["c"]


def test_what_leaves_nothing_to_draw_is_refused(folders, capsys):
    for words, truth in ((["--best", 1], False), (["--names", "nowhere"], True)):
        assert visualize(folders, *words, truth=truth) == 1
        assert "Error: " in capsys.readouterr().err and not (folders / "out").exists()
