"""Scores against a loop over pixels, and `s4m-sepl evaluate` on folders."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sepl_folders import save_labels, sepl

from s4m_d2.sepl.results import confusion, iou, miou, pixel_accuracy

CLASSES, VOID = 4, 255


def literal_scores(pairs, num_classes):
    """IoUs and the share of correct pixels, pixel by pixel, as the definitions read."""
    hits, false_positives, misses = ([0] * num_classes for _ in range(3))
    for truth, label in pairs:
        for true, given_class in zip(truth.ravel().tolist(), label.ravel().tolist(), strict=True):
            if true == VOID:
                continue
            if true == given_class:
                hits[true] += 1
            else:
                misses[true] += 1
                if given_class != VOID:
                    false_positives[given_class] += 1
    unions = [sum(counts) for counts in zip(hits, false_positives, misses, strict=True)]
    ious = [h / u if u else math.nan for h, u in zip(hits, unions, strict=True)]
    return ious, sum(hits) / scored if (scored := sum(hits + misses)) else math.nan


values = st.sampled_from([*range(CLASSES), VOID])


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 5)).flatmap(
            lambda size: st.tuples(*[arrays.arrays(np.uint8, size, elements=values)] * 2)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_maps_score_as_a_loop_over_their_pixels_does(pairs):
    counts = sum(confusion(*pair, CLASSES) for pair in pairs)
    ious, accuracy = literal_scores(pairs, CLASSES)
    np.testing.assert_allclose(iou(counts), ious, rtol=1e-15)
    present = [value for value in ious if not math.isnan(value)]
    np.testing.assert_allclose(miou(counts), np.mean(present) if present else math.nan)
    np.testing.assert_allclose(pixel_accuracy(counts), accuracy)


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
def folders(tmp_path):
    for name, labels in IMAGES.items():
        for kind, label in zip(("truth", "pseudo", "enhanced"), labels, strict=True):
            save_labels(tmp_path / kind, {name: label})
    return tmp_path


def evaluate(folders, *words, pseudo=True, classes=("--num-classes", 4)):
    before = ["--pseudo-labels", folders / "pseudo"] if pseudo else []
    given = ["--enhanced", folders / "enhanced", "--ground-truth", folders / "truth", *before]
    report = folders / "out" / "report.json"
    status = sepl("evaluate", *given, *classes, "--json", report, *words)
    return status, json.loads(report.read_text()) if report.exists() else None


def test_the_table_and_the_report_have_the_scores_of_the_whole_set(folders, capsys):
    (folders / "names.txt").write_text("background\na|b\nc\n")
    status, report = evaluate(folders, classes=("--class-names", folders / "names.txt"))
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


def test_without_pseudo_labels_the_enhanced_ones_are_scored(folders, capsys):
    status, report = evaluate(folders, pseudo=False)
    assert status == 0 and capsys.readouterr().out.endswith("\n3 images\n")
    assert report["miou"] == {"after": pytest.approx(np.mean(AFTER_IOU))}
    assert report["images"][0] == {"name": "better", "after": 1.0} and "improved" not in report


def test_pseudo_labels_of_another_suffix_and_kind(folders):
    _, expected = evaluate(folders)
    for name, (_, pseudo, _) in IMAGES.items():
        (folders / "pseudo" / f"{name}.png").unlink()
        np.save(folders / "pseudo" / f"{name}_cam.npy", {0: np.array(pseudo) * 0.4})
    assert evaluate(folders, "--suffix", "_cam") == (0, expected)
    _, other = evaluate(folders, "--suffix", "_cam", "--background-score", "0.5")
    assert other["iou"]["class 1"]["before"] == 0


HOSTILE = {
    "sizes": lambda folders: save_labels(folders / "truth", {"better": [[0, 0, 1]]}),
    "class": lambda folders: save_labels(folders / "enhanced", {"better": [[0, 0, 1, 77]]}),
    "cut": lambda folders: (folders / "pseudo/better.png").write_bytes(b"\x89PNG"),
    "missing": lambda folders: (folders / "enhanced/better.png").unlink(),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_an_image_that_cannot_be_compared_is_named_and_counts_nowhere(folders, capsys, damage):
    (folders / "list.txt").write_text("same\nworse\n")
    _, expected = evaluate(folders, "--list", folders / "list.txt")
    assert expected["num_images"] == 2
    HOSTILE[damage](folders)
    status, report = evaluate(folders)
    assert status == 1 and "  better: " in capsys.readouterr().err
    assert list(report.pop("problems")) == ["better"]
    assert report == {key: value for key, value in expected.items() if key != "problems"}


def test_the_ground_truth_may_be_of_more_images_and_a_list_asks_for_all_of_its(folders):
    _, expected = evaluate(folders)
    save_labels(folders / "truth", {"extra": [[0]]})
    assert evaluate(folders) == (0, expected)
    (folders / "list.txt").write_text("better\nnowhere\n")
    status, report = evaluate(folders, "--list", folders / "list.txt")
    assert status == 1 and report["num_images"] == 1 and list(report["problems"]) == ["nowhere"]
