import json
import re
import shutil

import numpy as np
import pytest
from label_folders import command, write_labels
from PIL import Image

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sepl import comparison as comparison_module
from s4m_d2.sepl import evaluate_command

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
    kinds = ("truth", "pseudo", "enhanced")
    for kind, labels in zip(kinds, zip(*IMAGES.values(), strict=True), strict=True):
        write_labels(tmp_path / kind, dict(zip(IMAGES, labels, strict=True)))
    return tmp_path


def evaluate(folders, *arguments, pseudo=True, classes=("--num-classes", 4)):
    before = ["--pseudo-labels", folders / "pseudo"] if pseudo else []
    truth = ["--ground-truth", folders / "truth"]
    report = folders / "out" / "report.json"
    status = command(
        evaluate_command,
        *["--enhanced", folders / "enhanced", *before, *truth, *classes],
        *["--json", report, *arguments],
    )
    return status, json.loads(report.read_text())


def table(text):
    """First cell → other cells of a printed Markdown table."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_table_and_the_report_have_the_scores_of_the_whole_set(folders, capsys):
    status, report = evaluate(folders)
    assert status == 0
    out = capsys.readouterr()
    assert out.err == ""
    assert table(out.out) == {
        "": ["before", "after", "gain"],
        "background": ["85.71", "100.00", "+14.29"],
        "class 1": ["80.00", "60.00", "-20.00"],
        "class 2": ["–", "–", "–"],
        "class 3": ["–", "–", "–"],
        "mIoU": ["82.86", "80.00", "-2.86"],
        "pixel accuracy": ["90.91", "81.82", "-9.09"],
    }
    assert out.out.endswith("3 images: 1 improved, 1 worsened, 1 as before\n")

    assert report["iou"]["class 1"] == pytest.approx({"before": 0.8, "after": 0.6, "gain": -0.2})
    assert report["iou"]["class 2"] == {"before": None, "after": None, "gain": None}
    before, after = np.mean(BEFORE_IOU), np.mean(AFTER_IOU)
    expected = {"before": before, "after": after, "gain": after - before}
    assert report["miou"] == pytest.approx(expected)
    assert report["pixel_accuracy"] == pytest.approx(
        {"before": 10 / 11, "after": 9 / 11, "gain": -1 / 11}
    )
    assert (report["num_images"], report["improved"], report["worsened"]) == (3, 1, 1)
    assert report["problems"] == {}
    gains = {image["name"]: image["gain"] for image in report["images"]}
    assert gains == pytest.approx(GAINS)
    assert [entry.name for entry in (folders / "out").iterdir()] == ["report.json"]


def test_without_pseudo_labels_the_enhanced_ones_are_scored(folders, capsys):
    status, report = evaluate(folders, pseudo=False)
    assert status == 0
    out = capsys.readouterr().out
    assert table(out)["class 1"] == ["60.00"]
    assert out.endswith("\n3 images\n")
    assert report["miou"] == {"after": pytest.approx(np.mean(AFTER_IOU))}
    assert report["images"][0] == {"name": "better", "after": 1.0}
    assert "improved" not in report


def test_pseudo_labels_of_another_suffix_and_kind(folders):
    _, expected = evaluate(folders)
    for name, (_, pseudo, _) in IMAGES.items():
        (folders / "pseudo" / f"{name}.png").unlink()
        np.save(folders / "pseudo" / f"{name}_cam.npy", {0: np.array(pseudo) * 0.4})
    assert evaluate(folders, "--suffix", "_cam") == (0, expected)
    _, other = evaluate(folders, "--suffix", "_cam", "--background-score", "0.5")
    assert other["iou"]["class 1"]["before"] == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_and_chunks_do_not_change_the_scores(folders, monkeypatch, workers):
    expected = evaluate(folders, "--workers", 1)
    monkeypatch.setattr(comparison_module, "CHUNK_IMAGES", 1)
    assert evaluate(folders, "--workers", workers) == expected


def test_class_names_and_presets_name_the_rows(folders, capsys):
    names = folders / "names.txt"
    names.write_text("background\nsea|shore\n")
    assert evaluate(folders, classes=("--class-names", names))[0] == 0
    assert r"sea\|shore" in table(capsys.readouterr().out)
    _, report = evaluate(folders, classes=("--preset", "coco"))
    assert list(report["iou"])[:2] == ["background", "person"] and len(report["iou"]) == 81


def small_truth(folders):
    write_labels(folders / "truth", {"better": [[0, 0, 1]]})


def unknown_class(folders):
    write_labels(folders / "enhanced", {"better": [[0, 0, 1, 77]]})


def cut_file(folders):
    path = folders / "pseudo" / "better.png"
    path.write_bytes(path.read_bytes()[:40])


def color_picture(folders):
    Image.new("RGB", (4, 1), "red").save(folders / "pseudo" / "better.png")


def missing(kind):
    return lambda folders: (folders / kind / "better.png").unlink()


HOSTILE = [
    (small_truth, [r"sizes", r"truth/better.png \(1, 3\)", r"pseudo/better.png \(1, 4\)"]),
    (unknown_class, [r"enhanced/better.png has class indices \[77\]"]),
    (cut_file, ["pseudo/better.png"]),
    (color_picture, ["pseudo/better.png is no label map"]),
    (missing("truth"), ["no ground truth in '.*truth'"]),
    (missing("pseudo"), ["no pseudo-label in '.*pseudo'"]),
    (missing("enhanced"), ["no enhanced label in '.*enhanced'"]),
]


@pytest.mark.parametrize(("damage", "messages"), HOSTILE)
def test_an_image_that_cannot_be_compared_is_named_and_the_others_go_on(
    folders, capsys, damage, messages
):
    for kind in ("truth", "pseudo", "enhanced"):
        (folders / "rest" / kind).mkdir(parents=True)
        for name in ("same", "worse"):
            shutil.copy(folders / kind / f"{name}.png", folders / "rest" / kind)
    _, expected = evaluate(folders / "rest")
    damage(folders)
    capsys.readouterr()

    status, report = evaluate(folders)
    out = capsys.readouterr()
    assert status == 1
    assert report["num_images"] == 2 and "2 images: 0 improved, 1 worsened" in out.out
    assert list(report.pop("problems")) == ["better"]
    expected.pop("problems")
    assert report == expected, "neither before nor after counts the image"
    assert out.err.startswith("1 image could not be compared:\n  better: ")
    for message in messages:
        assert re.search(message, out.err), out.err


def test_a_list_chooses_the_images_and_asks_for_all_of_them(folders, capsys):
    names = folders / "train.txt"
    names.write_text("better\nworse\n")
    (folders / "truth" / "same.png").unlink()  # not in the list: no matter
    status, report = evaluate(folders, "--list", names)
    assert status == 0
    assert [image["name"] for image in report["images"]] == ["better", "worse"]

    names.write_text("better\nnowhere\n")
    status, report = evaluate(folders, "--list", names)
    assert status == 1 and report["num_images"] == 1
    message = report["problems"]["nowhere"]
    assert all(f"no {kind}" in message for kind in ("ground truth", "pseudo-label", "enhanced"))


def test_the_ground_truth_may_be_of_more_images(folders):
    _, expected = evaluate(folders)
    write_labels(folders / "truth", {"extra": [[0]]})
    assert evaluate(folders) == (0, expected)


def test_no_image_in_common_leaves_a_report_without_scores(folders, capsys):
    (folders / "truth").rename(folders / "other")
    write_labels(folders / "truth", {"foreign": [[0]]})
    status, report = evaluate(folders)
    assert status == 1
    out = capsys.readouterr()
    assert "|" not in out.out and out.out.startswith("0 images")
    assert report["miou"] == {"before": None, "after": None, "gain": None}
    assert len(report["problems"]) == 3 and report["images"] == []


def test_an_image_of_which_nothing_is_scored_is_neither_better_nor_worse(folders, capsys):
    write_labels(folders / "truth", {"better": [[255] * 4]})
    status, report = evaluate(folders)
    assert status == 0
    assert report["images"][0] == {"name": "better", "before": None, "after": None, "gain": None}
    assert "3 images: 0 improved, 1 worsened, 2 as before" in capsys.readouterr().out


def test_many_problems_are_counted_and_the_first_are_printed(folders, capsys):
    write_labels(folders / "enhanced", {f"extra{number:02}": [[0]] for number in range(30)})
    status, report = evaluate(folders)
    assert status == 1 and len(report["problems"]) == 30
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "30 images could not be compared:" and err[-1] == "  and 10 more"
    assert len(err) == 22


def test_what_makes_a_comparison_impossible_is_an_error_and_writes_nothing(folders):
    with pytest.raises(DatasetError, match="cannot be listed"):
        evaluate(folders / "nowhere")
    with pytest.raises(InputError, match="preset"):
        evaluate(folders, classes=("--preset", "voc", "--num-classes", 4))
    with pytest.raises(DatasetError, match="list.txt"):
        evaluate(folders, "--list", folders / "list.txt")
    assert not (folders / "out").exists()


@pytest.mark.parametrize("workers", ["0", "-1", "many"])
def test_workers_must_be_a_positive_number(folders, capsys, workers):
    with pytest.raises(SystemExit) as stopped:
        evaluate(folders, f"--workers={workers}")
    assert stopped.value.code == 2
    assert "no whole number of at least 1" in capsys.readouterr().err
