"""`sepl enhance` with bad input: the others go on, and what is refused is refused at once."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from enhance_folders import (
    CAM,
    CLASS,
    MASK,
    SIZE,
    arguments,
    content,
    drawn,
    enhance,
    label,
    make_folders,
    report,
    rle,
)
from PIL import Image

from s4m_d2.sepl.cli import main
from s4m_d2.sepl.labels import write_label


@pytest.fixture
def root(tmp_path):
    return make_folders(tmp_path / "data")


def unreadable_label(root):
    path = root / "cam" / "b.png"
    path.write_bytes(path.read_bytes()[:-20])


def empty_label(root):
    (root / "cam" / "b.png").write_bytes(b"")


def color_label(root):
    Image.new("RGB", (8, 6), "red").save(root / "cam" / "b.png")


def class_beyond_the_count(root):
    write_label(root / "cam" / "b.png", drawn(CAM, 21))


def label_of_another_size(root):
    write_label(root / "cam" / "b.png", drawn(CAM, CLASS, size=(8, 6)))


def mask_of_another_size(root):
    shutil.rmtree(root / "masks" / "b", ignore_errors=True)
    (root / "masks" / "b.json").write_text(json.dumps([rle(MASK, size=(7, 8))]))


def mask_picture_of_another_size(root):
    (root / "masks" / "b.json").unlink()
    (root / "masks" / "b").mkdir()
    Image.fromarray(drawn(MASK, 255, size=(7, 8))).save(root / "masks" / "b" / "0.png")


def broken_masks(root):
    (root / "masks" / "b.json").write_text("[{")


def masks_twice(root):
    (root / "masks" / "b").mkdir()


def no_masks(root):
    (root / "masks" / "b.json").unlink()


BROKEN = {
    unreadable_label: ("failed", "b.png cannot be read"),
    empty_label: ("failed", "b.png cannot be read"),
    color_label: ("failed", "b.png is no label map"),
    class_beyond_the_count: ("failed", "b.png has class indices [21], but there are 21 classes"),
    label_of_another_size: ("failed", "b.json, mask 0 of 1"),
    mask_of_another_size: ("failed", "b.json, mask 0 of 1"),
    mask_picture_of_another_size: ("failed", "0.png has (height, width) (7, 8)"),
    broken_masks: ("failed", "b.json cannot be read as JSON"),
    masks_twice: ("failed", "both hold masks of the image 'b'"),
    no_masks: ("missing", "has no masks of it: no folder b, b.json or b.json.gz"),
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_a_bad_image_is_named_and_the_others_go_on(spoil, root, capsys):
    kind, says = BROKEN[spoil]
    spoil(root)
    assert enhance(root) == 1
    found = report(root)
    assert list(found[kind]) == ["b"] and says in found[kind]["b"]
    assert found["counts"] == {"done": 2, "failed": 0, "missing": 0, kind: 1}
    assert sorted(found["images"]) == ["a", "c"]
    assert sorted(content(root / "out")) == ["a.png", "c.png", "sepl.json"]
    printed = capsys.readouterr().err
    assert "\n  b: " in printed and says in printed and "Traceback" not in printed
    np.testing.assert_array_equal(label(root, "c"), drawn(MASK, CLASS))


def test_a_mended_image_is_made_by_the_next_run(root):
    no_masks(root)
    assert enhance(root) == 1
    (root / "masks" / "b.json").write_text(json.dumps([rle(MASK)]))
    assert enhance(root) == 0
    assert enhance(root, output="whole") == 0
    assert content(root / "out") == content(root / "whole")


def test_a_listed_image_without_label(root, capsys):
    (root / "train.txt").write_text("a\nz\n../x\n")
    assert enhance(root, "--list", str(root / "train.txt")) == 1
    assert sorted(report(root)["missing"]) == ["x", "z"]
    printed = capsys.readouterr().err
    assert "2 images with a missing file:" in printed
    assert "  z: there is no pseudo-label of it" in printed


def test_many_problems_are_counted_and_the_first_ones_printed(tmp_path, capsys):
    names = [f"{number:02d}" for number in range(23)]
    root = make_folders(tmp_path / "data", names)
    for name in names[1:]:
        (root / "masks" / f"{name}.json").unlink()
    assert enhance(root) == 1
    printed = capsys.readouterr().err
    assert "22 images with a missing file:" in printed
    assert len(re.findall("no masks of it", printed)) == 20 and "  and 2 more" in printed
    assert "1 images enhanced (0 of them before), 0 failed, 22 missing" in printed
    assert len(report(root)["missing"]) == 22


REFUSED = {
    "output is the labels": (["--output", "cam"], "--output '.*cam' is the folder of --pseudo-l"),
    "output is the masks": (["--output", "masks"], "is the folder of --masks"),
    "output is the images": (["--output", "images", "--images", "images"], "of --images"),
    "output by another path": (["--output", "masks/../cam"], "is the folder of --pseudo-labels"),
    "output by a link": (["--output", "link"], "is the folder of --pseudo-labels"),
    "output below the masks": (["--output", "masks/new"], "lies in the folder of --masks"),
    "output is a file": (["--output", "cam/a.png"], "lies in"),
    "output is another file": (["--output", "file"], "'.*file' cannot be written.*choose another"),
    "no labels": (["--pseudo-labels", "empty"], "'.*empty' has no label maps.*but nothing"),
    "labels of another kind": (["--pseudo-labels", "images"], "label maps.*but 3 .jpg files"),
    "labels of another suffix": (["--suffix", "_pseudo"], "label maps.*_pseudo.*but 3 .png files"),
    "masks in one folder": (["--masks", "flat"], "flat' has nothing.*'a'.*but 2 .png files"),
    "images of others": (["--images", "flat"], "flat' has nothing.*'a'.*but 2 .png files"),
    "labels are nowhere": (["--pseudo-labels", "none"], "'.*none' cannot be listed"),
    "masks are nowhere": (["--masks", "none"], "'.*none' cannot be listed.*holds the masks"),
    "images are nowhere": (["--images", "none"], "'.*none' cannot be listed.*holds the images"),
    "list is nowhere": (["--list", "none"], "none cannot be read"),
    "preset and count": (["--preset", "voc", "--num-classes", "9"], "the preset 'voc' has its own"),
    "too many classes": (["--num-classes", "256"], "expected 2 to 255"),
    "names are nowhere": (["--class-names", "none"], "none cannot be read"),
    "options of SAM": (["--device", "cpu"], "--device is for masks that SAM makes, but --masks"),
    "settings of SAM": (["--points-per-side", "8"], "--points-per-side is for masks that SAM"),
    "cache without SAM": (["--mask-cache", "x"], "--mask-cache is for masks that SAM makes"),
}  # fmt: skip
SAM_REFUSED = {
    "no images": ([], "--sam needs --images"),
    "no type": (["--images", "images", "--sam", "sam2"], "--sam-type is None; .*one of hiera_t"),
    "wrong type": (["--images", "images", "--sam", "segment_anything", "--sam-type", "hiera_t"],
                   "--sam-type is 'hiera_t'; --sam segment_anything expects one of vit_b"),
    "no checkpoint": (["--images", "images", "--sam", "segment_anything", "--sam-type", "vit_b"],
                      "needs --sam-checkpoint: sam_vit_b_.*from https"),
    "checkpoint is nowhere": (["--images", "images", "--sam-checkpoint", "none"],
                              "--sam-checkpoint '.*none' is no file"),
    "type of the tiny one": (["--images", "images", "--sam-type", "vit_b"], "tiny has no types"),
    "no device": (["--images", "images", "--device", "disk"], "--device disk is no device"),
    "setting out of range": (["--images", "images", "--pred-iou-thresh", "2"],
                             "pred_iou_thresh is 2.0; expected"),
    "cache is an input": (["--images", "images", "--mask-cache", "images"],
                          "--mask-cache '.*images' is the folder of --images"),
}  # fmt: skip
WORDS = ("cpu", "disk", "voc", "sam2", "segment_anything", "vit_b", "hiera_t")


def refusal(root: Path, start: list[str], words: list[str], capsys) -> str:
    """What the command says; it ends with status 1 and changes nothing."""
    (root / "empty").mkdir()
    (root / "file").touch()
    (root / "link").symlink_to(root / "cam")
    (root / "flat").mkdir()
    for name in ("a_0", "a_1"):
        Image.new("L", SIZE[::-1]).save(root / "flat" / f"{name}.png")
    before = content(root)
    for number, word in enumerate(words):
        if not word.startswith("--") and word not in WORDS and not word.isdigit():
            words[number] = str(root / word)
    assert main([*start, *words]) == 1
    assert content(root) == before and not (root / "out").exists()
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


@pytest.mark.parametrize("row", REFUSED)
def test_what_is_refused_before_anything_is_written(row, root, capsys):
    words, says = REFUSED[row]
    said = refusal(root, arguments(root), list(words), capsys)
    assert re.search(says, said), said


@pytest.mark.parametrize("row", SAM_REFUSED)
def test_what_is_refused_where_sam_makes_the_masks(row, root, capsys):
    words, says = SAM_REFUSED[row]
    said = refusal(root, arguments(root, "--sam", "tiny_toyscapes"), list(words), capsys)
    assert re.search(says, said), said


def test_a_gpu_that_is_not_there(root, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    start = arguments(root, "--sam", "tiny_toyscapes", "--device", "cuda:1")
    said = refusal(root, start, ["--images", "images"], capsys)
    assert "--device cuda:1: PyTorch finds no GPU here; use --device cpu" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--workers", "0"],
        ["--workers", "two"],
        ["--o-s-thresh", "1.5"],
        ["--o-p-thresh", "nan"],
        ["--sam", "tiny_toyscapes"],
        ["--preset", "ade"],
        ["--bogus"],
    ],
    ids=" ".join,
)
def test_misuse_of_options(words, root, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments(root), *words])
    assert ended.value.code == 2
    assert f"error: argument {words[0]}" in capsys.readouterr().err or words == ["--bogus"]
    assert not (root / "out").exists()


def test_neither_masks_nor_sam(root, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--pseudo-labels", str(root / "cam"), "--output", str(root / "out")])
    assert ended.value.code == 2
    assert "one of the arguments --masks --sam is required" in capsys.readouterr().err
