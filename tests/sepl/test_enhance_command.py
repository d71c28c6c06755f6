"""`sepl enhance`: what it writes, what it reports, and what each option does."""

import json

import numpy as np
import pytest
from enhance_folders import (
    CAM,
    CLASS,
    MASK,
    SIZE,
    content,
    drawn,
    enhance,
    label,
    make_folders,
    rle,
)
from enhance_folders import report as read_report
from PIL import Image

from s4m_d2.sepl.classes import COCO, palette
from s4m_d2.sepl.labels import write_label


@pytest.fixture
def root(tmp_path):
    return make_folders(tmp_path / "data")


def test_label_maps_are_redrawn_and_reported(root, capsys):
    inputs = {name: content(root / name) for name in ("cam", "masks")}
    assert enhance(root) == 0
    for name in "abc":
        np.testing.assert_array_equal(label(root, name), drawn(MASK, CLASS))
    with Image.open(root / "out" / "a.png") as image:
        assert image.mode == "P"
        assert image.convert("RGB").getpixel((1, 1)) == tuple(palette()[CLASS].tolist())
    assert sorted(content(root / "out")) == ["a.png", "b.png", "c.png", "sepl.json"]
    assert inputs == {name: content(root / name) for name in ("cam", "masks")}
    found = read_report(root)
    assert found["counts"] == {"done": 3, "failed": 0, "missing": 0}
    assert found["images"]["b"] == {
        "size": list(SIZE), "masks": 1, "selected": 1, "classes": [CLASS],
        "classes_without_mask": [], "changed_pixels": 2,
    }  # fmt: skip
    assert found["settings"] == {
        "pseudo_labels": str(root / "cam"), "masks": str(root / "masks"), "num_classes": 21,
        "o_s_thresh": 0.5, "o_p_thresh": 0.85, "keep_uncovered": False, "background_score": 0.15,
    }  # fmt: skip
    printed = capsys.readouterr()
    assert "3 images enhanced (0 of them before), 0 failed, 0 missing" in printed.err
    assert printed.out == ""


def test_void_and_classes_without_masks_stay(root):
    cam = drawn(CAM, CLASS)
    cam[0, 7], cam[5] = 255, 7
    write_label(root / "cam" / "a.png", cam)
    assert enhance(root) == 0
    expected = drawn(MASK, CLASS)
    expected[0, 7], expected[5] = 255, 7
    np.testing.assert_array_equal(label(root, "a"), expected)
    record = read_report(root)["images"]["a"]
    assert record["classes"] == [CLASS, 7] and record["classes_without_mask"] == [7]


def test_masks_as_folders_of_pngs(root):
    for name in "abc":
        (root / "masks" / f"{name}.json").unlink()
        (root / "masks" / name).mkdir()
        Image.fromarray(drawn(MASK, 255)).save(root / "masks" / name / "0.png")
    assert enhance(root) == 0
    np.testing.assert_array_equal(label(root, "a"), drawn(MASK, CLASS))


def test_label_maps_by_another_suffix(root):
    assert enhance(root, output="plain") == 0
    for path in list((root / "cam").iterdir()):
        path.rename(path.with_name(f"{path.stem}_pseudo.png"))
    assert enhance(root, "--suffix", "_pseudo") == 0
    for name in "abc":
        np.testing.assert_array_equal(label(root, name), label(root, name, "plain"))


def test_label_maps_and_cam_scores_of_numpy(root):
    """The scores of the class beyond its label map lie between two background scores."""
    scores = drawn(CAM, 1) * 0.5 + drawn(MASK, 1) * 0.2
    np.save(root / "cam" / "a.npy", drawn(CAM, CLASS).astype(int))
    np.save(root / "cam" / "b.npy", {CLASS - 1: scores})
    np.save(root / "cam" / "c.npy", {"keys": np.array([CLASS - 1]), "cam": scores[None]})
    for path in (root / "cam").glob("*.png"):
        path.unlink()
    keep = ("--o-s-thresh", "1", "--o-p-thresh", "1")  # no mask is selected
    assert enhance(root, *keep) == 0
    assert enhance(root, *keep, "--background-score", "0.3", output="high") == 0
    for output, window in (("out", MASK), ("high", CAM)):
        np.testing.assert_array_equal(label(root, "a", output), drawn(CAM, CLASS))
        for name in "bc":
            np.testing.assert_array_equal(label(root, name, output), drawn(window, CLASS))


def test_labels_of_which_none_has_a_class(root, capsys):
    for name in "ab":
        write_label(root / "cam" / f"{name}.png", drawn(CAM, 255))
    assert enhance(root) == 0
    assert "warning" not in capsys.readouterr().err
    write_label(root / "cam" / "c.png", drawn(CAM, 255))
    assert enhance(root, "--overwrite") == 0
    assert "warning: no label map has a class" in capsys.readouterr().err


def test_thresholds_on_the_command_line(root):
    """The mask has o_s 4/6 and o_p 1."""
    for options, selected in (
        (("--o-s-thresh", "0.66", "--o-p-thresh", "1"), 1),
        (("--o-s-thresh", "0.67", "--o-p-thresh", "1"), 0),
        (("--o-s-thresh", "0.67", "--o-p-thresh", "0.99"), 1),
    ):
        assert enhance(root, "--overwrite", *options) == 0
        assert read_report(root)["images"]["a"]["selected"] == selected
        np.testing.assert_array_equal(
            label(root, "a"), drawn(MASK if selected else CAM, CLASS), str(options)
        )


def test_pixels_that_no_mask_covers(root):
    window = (slice(1, 2), slice(1, 3))  # half of the class
    (root / "masks" / "a.json").write_text(json.dumps([rle(window)]))
    assert enhance(root) == 0
    np.testing.assert_array_equal(label(root, "a"), drawn(window, CLASS))
    assert enhance(root, "--keep-uncovered", output="kept") == 0
    np.testing.assert_array_equal(label(root, "a", "kept"), drawn(CAM, CLASS))


def test_classes_of_other_data(root):
    write_label(root / "cam" / "a.png", drawn(CAM, 80))
    assert enhance(root) == 1
    assert read_report(root)["counts"] == {"done": 2, "failed": 1, "missing": 0}
    assert enhance(root, "--preset", "coco", output="coco") == 0
    assert read_report(root, "coco")["classes"] == list(COCO.names)
    assert enhance(root, "--num-classes", "81", output="81") == 0
    assert label(root, "a", "81").max() == 80


def test_a_list_names_the_images(root):
    (root / "train.txt").write_text("c\na\n")
    assert enhance(root, "--list", str(root / "train.txt")) == 0
    assert sorted(read_report(root)["images"]) == ["a", "c"]
    assert not (root / "out" / "b.png").exists()


def test_the_rest_of_a_list_joins_what_is_there(root, capsys):
    (root / "train.txt").write_text("c\n")
    assert enhance(root, "--list", str(root / "train.txt")) == 0
    assert enhance(root) == 0
    assert sorted(read_report(root)["images"]) == ["a", "b", "c"]
    assert "3 images enhanced (1 of them before)" in capsys.readouterr().err
    assert enhance(root, output="whole") == 0
    assert content(root / "out") == content(root / "whole")


def test_images_are_compared_with_their_labels(root):
    assert enhance(root, "--images", str(root / "images")) == 0
    Image.new("RGB", (9, 6)).save(root / "images" / "a.jpg")
    (root / "images" / "b.jpg").unlink()
    assert enhance(root, "--images", str(root / "images"), output="other") == 1
    found = read_report(root, "other")
    assert "a.png has (height, width) (6, 8), but" in found["failed"]["a"]
    assert found["missing"] == {"b": "there is no image of it"}
    assert sorted(found["images"]) == ["c"]


def test_an_image_that_is_turned_upright_after_the_label_was_made(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(root / "images" / "a.jpg", exif=exif)
    assert enhance(root, "--images", str(root / "images")) == 1
    problem = read_report(root)["failed"]["a"]
    assert "has (8, 6)" in problem and "turned upright as its EXIF data say" in problem
