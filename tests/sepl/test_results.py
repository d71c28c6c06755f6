"""Scores against a loop over pixels; pictures; `s4m-sepl evaluate` and `visualize` on folders."""

import json
import math

import numpy as np
import pytest
from helpers import rle_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sepl_folders import save_labels, save_masks, save_png, sepl

from s4m_d2.sepl import VOID, results
from s4m_d2.sepl.results import FILL_ALPHA, WHITE_SHARE, draw_label, draw_masks

CLASSES = 4


def literal_scores(pairs, num_classes):
    """IoUs and the share of correct pixels, of those that are not void in the truth."""
    truth, label = np.moveaxis(np.stack(pairs), 1, 0)
    truth, label = truth[truth != VOID], label[truth != VOID]
    classes = [(truth == index, label == index) for index in range(num_classes)]
    unions = [(true | given).sum() for true, given in classes]
    pairs = zip(classes, unions, strict=True)
    ious = [(true & given).sum() / n if n else math.nan for (true, given), n in pairs]
    return ious, (truth == label).mean() if len(truth) else math.nan


maps = arrays.arrays(np.uint8, (2, 3, 5), elements=st.sampled_from([*range(CLASSES), VOID]))


@given(st.lists(maps, min_size=1, max_size=5))
def test_any_maps_score_as_a_loop_over_their_pixels_does(pairs):
    counts = sum(results.confusion(*pair, CLASSES) for pair in pairs)
    ious, accuracy = literal_scores(pairs, CLASSES)
    np.testing.assert_allclose(results.iou(counts), ious, rtol=1e-15)
    present = [value for value in ious if not math.isnan(value)]
    np.testing.assert_allclose(results.miou(counts), np.mean(present) if present else math.nan)
    np.testing.assert_allclose(results.pixel_accuracy(counts), accuracy)


# By name: truth, pseudo-label, enhanced label; of the classes 0, 1, 2 and void.
IMAGES = {
    "better": ([[0, 0, 1, 1]], [[0, 0, 0, 1]], [[0, 0, 1, 1]]),
    "same": ([[0, 0, 0, 255]], [[0, 0, 0, 1]], [[0, 0, 0, 0]]),
    "worse": ([[1], [1], [1], [0]], [[1], [1], [1], [0]], [[1], [255], [255], [0]]),
}
# Scored are 6 background pixels, all right before and after, and 5 of class 1: 4 right, then 3.
BEFORE_IOU, AFTER_IOU = [6 / 7, 4 / 5], [6 / 6, 3 / 5]
GAINS = {"better": 1 - (2 / 3 + 1 / 2) / 2, "same": 0.0, "worse": (1 + 1 / 3) / 2 - 1}


@pytest.fixture
def maps_to_score(tmp_path):
    for name, labels in IMAGES.items():
        for kind, label in zip(("truth", "pseudo", "enhanced"), labels, strict=True):
            save_labels(tmp_path / kind, {name: label})
    return tmp_path


def evaluate(root, *words, pseudo=True, classes=("--num-classes", 4)):
    before = ["--pseudo-labels", root / "pseudo"] if pseudo else []
    given = ["--enhanced", root / "enhanced", "--ground-truth", root / "truth", *before]
    report = root / "out" / "report.json"
    status = sepl("evaluate", *given, *classes, "--json", report, *words)
    return status, json.loads(report.read_text()) if report.exists() else None


def test_the_table_and_the_report_have_the_scores_of_the_whole_set(maps_to_score, capsys):
    names = maps_to_score / "names.txt"
    names.write_text("background\na|b\nc\n")
    status, report = evaluate(maps_to_score, classes=("--class-names", names))
    assert status == 0
    out = capsys.readouterr().out
    rows = [line.replace(" ", "").split("|")[1:-1] for line in out.splitlines() if "|" in line]
    assert rows[0] == ["", "before", "after", "gain"] and len(rows) == 7
    assert ["mIoU", "82.86", "80.00", "-2.86"] in rows and ["c", "–", "–", "–"] in rows
    assert out.endswith("3 images: 1 improved, 1 worsened, 1 as before\n")
    assert report["iou"]["a|b"] == pytest.approx({"before": 0.8, "after": 0.6, "gain": -0.2})
    assert report["iou"]["c"] == {"before": None, "after": None, "gain": None}
    before, after = np.mean(BEFORE_IOU), np.mean(AFTER_IOU)
    expected = {"before": before, "after": after, "gain": after - before}
    assert report["miou"] == pytest.approx(expected)
    assert report["pixel_accuracy"]["after"] == pytest.approx(9 / 11)
    assert (report["num_images"], report["improved"], report["worsened"]) == (3, 1, 1)
    assert {image["name"]: image["gain"] for image in report["images"]} == pytest.approx(GAINS)
    assert report["problems"] == {}


def test_without_pseudo_labels_the_enhanced_ones_are_scored(maps_to_score, capsys):
    status, report = evaluate(maps_to_score, pseudo=False)
    assert status == 0 and capsys.readouterr().out.endswith("\n3 images\n")
    assert report["miou"] == {"after": pytest.approx(np.mean(AFTER_IOU))}
    assert report["images"][0] == {"name": "better", "after": 1.0} and "improved" not in report


def test_pseudo_labels_of_another_suffix_and_kind(maps_to_score):
    _, expected = evaluate(maps_to_score)
    for name, (_, pseudo, _) in IMAGES.items():
        (maps_to_score / "pseudo" / f"{name}.png").unlink()
        np.save(maps_to_score / "pseudo" / f"{name}_cam.npy", {0: np.array(pseudo) * 0.4})
    assert evaluate(maps_to_score, "--suffix", "_cam") == (0, expected)
    _, other = evaluate(maps_to_score, "--suffix", "_cam", "--background-score", "0.5")
    assert other["iou"]["class 1"]["before"] == 0


HOSTILE = {
    "sizes": lambda root: save_labels(root / "truth", {"better": [[0, 0, 1]]}),
    "class": lambda root: save_labels(root / "enhanced", {"better": [[0, 0, 1, 77]]}),
    "cut": lambda root: (root / "pseudo/better.png").write_bytes(b"\x89PNG"),
    "missing": lambda root: (root / "enhanced/better.png").unlink(),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_an_image_that_cannot_be_compared_is_named_and_counts_nowhere(
    maps_to_score, capsys, damage
):
    (maps_to_score / "list.txt").write_text("same\nworse\n")
    _, expected = evaluate(maps_to_score, "--list", maps_to_score / "list.txt")
    assert expected["num_images"] == 2
    HOSTILE[damage](maps_to_score)
    status, report = evaluate(maps_to_score)
    assert status == 1 and "  better: " in capsys.readouterr().err
    assert list(report.pop("problems")) == ["better"]
    assert report == {key: value for key, value in expected.items() if key != "problems"}


def test_the_ground_truth_may_be_of_more_images_and_a_list_asks_for_all_of_its(maps_to_score):
    _, expected = evaluate(maps_to_score)
    save_labels(maps_to_score / "truth", {"extra": [[0]]})
    assert evaluate(maps_to_score) == (0, expected)
    (maps_to_score / "list.txt").write_text("better\nnowhere\n")
    status, report = evaluate(maps_to_score, "--list", maps_to_score / "list.txt")
    assert status == 1 and report["num_images"] == 1 and list(report["problems"]) == ["nowhere"]


GRAY = 100
FADED = round(GRAY + WHITE_SHARE * (255 - GRAY))
# VOC's colors of some classes and void, as its development kit lists them.
COLORS = {1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 255: (224, 224, 192)}


def test_classes_and_void_have_vocs_colors_over_a_faded_image():
    label = np.array([[0, *COLORS]], np.uint8)
    [drawn] = draw_label(np.full((*label.shape, 3), GRAY, np.uint8), label).astype(int)
    assert (drawn[0] == FADED).all()  # background
    blended = np.array([*COLORS.values()]) * FILL_ALPHA + FADED * (1 - FILL_ALPHA)
    assert np.abs(drawn[1:] - blended).max() <= 1


SIZE = 24, 40
TRUE_WIDTH = 20  # columns of class 1 in the ground truth
# By name: columns of class 1 before and after. By falling gain: a, b, c, d, e.
WIDTHS = {"c": (15, 15), "a": (0, 20), "e": (20, 2), "b": (10, 18), "d": (20, 16)}
IMAGE = np.full((*SIZE, 3), GRAY, np.uint8)


def label_of(columns, index=1):
    values = np.zeros(SIZE, np.uint8)
    values[:, :columns] = index
    return values


@pytest.fixture
def images_to_draw(tmp_path):
    for name, (before, after) in WIDTHS.items():
        save_png(tmp_path / "images" / f"{name}.png", IMAGE)
        for kind, width in (("cam", before), ("sepl", after), ("truth", TRUE_WIDTH)):
            save_labels(tmp_path / kind, {name: label_of(width)})
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """What is to be drawn; nothing is."""
    calls = {}

    def note(rows, column_titles, path, row_titles, legend):
        names = [title.split()[0] for title in row_titles]
        calls.update(rows=rows, titles=row_titles, names=names)

    monkeypatch.setattr(results, "panel_grid", note)
    return calls


def visualize(root, *words, truth=True):
    given = ["--images", root / "images", "--pseudo-labels", root / "cam"]
    given += ["--enhanced", root / "sepl", "--output", root / "out" / "picture.png"]
    given += ["--ground-truth", root / "truth"] if truth else []
    return sepl("visualize", *given, *words)


def test_options_choose_the_images(images_to_draw, drawn):
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
        assert visualize(images_to_draw, *words) == 0
        assert drawn["names"] == list(names)
        if "a" in names:  # IoU of class 1 is 0, of background 20 / 40
            assert drawn["titles"][names.index("a")].endswith("25.0 → 100.0 (+75.0)")


def test_every_picture_stands_in_its_column(images_to_draw, drawn):
    save_masks(images_to_draw / "sepl" / "masks", {"b": [label_of(7)]})
    assert visualize(images_to_draw, "--names", "b") == 0
    before, after, true = (draw_label(IMAGE, label_of(n)) for n in (*WIDTHS["b"], TRUE_WIDTH))
    masks = draw_masks(IMAGE, [rle_of(label_of(7))])
    for picture, other in zip(drawn["rows"][0], (IMAGE, before, masks, after, true), strict=True):
        np.testing.assert_array_equal(picture, other)


def test_images_that_cannot_be_drawn_are_named_and_the_others_are_drawn(
    images_to_draw, drawn, capsys
):
    root = images_to_draw
    (root / "images/b.png").write_bytes(b"\x89PNG")
    save_png(root / "images/d.png", np.zeros((24, 50, 3)))
    save_masks(root / "masks", {**dict.fromkeys("ac", [label_of(7)]), "e": [np.zeros((5, 5))]})
    masks = ("--masks", root / "masks")
    assert visualize(root, *masks) == 1 and drawn["names"] == ["a", "c"]
    said = capsys.readouterr().err
    assert all(f"\n  {name}: " in said for name in "bde")
    save_labels(root / "cam", {"a": label_of(4, 99)})
    assert visualize(root, *masks, "--best", 2) == 1 and drawn["names"] == ["c"]


def test_what_leaves_nothing_to_draw_is_refused(images_to_draw, capsys):
    for words, truth in ((["--best", 1], False), (["--names", "nowhere"], True)):
        assert visualize(images_to_draw, *words, truth=truth) == 1
        assert "Error: " in capsys.readouterr().err and not (images_to_draw / "out").exists()
