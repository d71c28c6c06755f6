"""`s4m-sepl enhance`: what it writes, what each option does, bad input, and being continued."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, content
from PIL import Image
from sepl_folders import save_labels, save_masks, save_png, sepl
from toyscapes_scene import render_scene

from s4m_d2.sam.automatic_masks import AutomaticMasks
from s4m_d2.sepl.files import read_label, read_masks
from s4m_d2.sepl.folders import Enhancement

SIZE = (6, 8)
CAM = (slice(1, 3), slice(1, 3))  # 4 pixels of a class
MASK = (slice(1, 4), slice(1, 3))  # 6 pixels: o_s 4/6, o_p 1
CLASS = 3
UNCHANGED = ("--o-s-thresh", 1, "--o-p-thresh", 1)  # no mask is selected


def drawn(window, value=1, size=SIZE):
    """(H, W) uint8 zeros, and ``value`` in a window."""
    label = np.zeros(size, dtype=np.uint8)
    label[window] = value
    return label


def make_folders(root, names="abc"):
    """``cam``, ``masks`` and ``images`` of a few images, all of the same content."""
    save_labels(root / "cam", {name: drawn(CAM, CLASS) for name in names})
    save_masks(root / "masks", {name: [drawn(MASK)] for name in names})
    for name in names:
        save_png(root / "images" / f"{name}.png", np.zeros((*SIZE, 3)))
    return root


def arguments(root, *more, output="out"):
    """Those of `enhance` for such folders."""
    masks = [] if "--sam" in more else ["--masks", root / "masks"]
    return ["--pseudo-labels", root / "cam", "--output", root / output, *masks, *more]


def enhance(root, *more, output="out"):
    return sepl(*arguments(root, *more, output=output))


def label(root, name, output="out"):
    """An enhanced label map."""
    return read_label(root / output / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    return make_folders(tmp_path / "data")


def problems(root, output="out"):
    return json.loads((root / output / "sepl.json").read_text())["problems"]


def test_label_maps_are_redrawn_and_inputs_stay(root, capsys):
    inputs = content(root)
    assert sepl("enhance", *arguments(root)) == 0
    for name in "abc":
        np.testing.assert_array_equal(label(root, name), drawn(MASK, CLASS))
    assert sorted(content(root / "out")) == ["a.png", "b.png", "c.png", "sepl.json"]
    assert content(root).items() >= inputs.items()
    assert problems(root) == {} and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("o_s", "o_p", "window"),
    [(0.66, 1, MASK), (0.67, 1, CAM), (0.67, 0.99, MASK)],  # of 4/6 and 1
)
def test_options(o_s, o_p, window, root):
    (root / "train.txt").write_text("c\na\n")
    listed = ("--list", root / "train.txt", "--preset", "coco")
    assert enhance(root, *listed, "--o-s-thresh", o_s, "--o-p-thresh", o_p) == 0
    assert sorted(content(root / "out")) == ["a.png", "c.png", "sepl.json"]
    for name in "ac":
        np.testing.assert_array_equal(label(root, name), drawn(window, CLASS))


def test_labels_of_which_none_has_a_class(root, capsys):
    save_labels(root / "cam", dict.fromkeys("ab", drawn(CAM, 255)))
    assert enhance(root) == 0 and "warning" not in capsys.readouterr().err
    save_labels(root / "cam", {"c": drawn(CAM, 255)})
    assert enhance(root, "--overwrite") == 0 and "warning" in capsys.readouterr().err


def test_bad_images_are_named_and_the_others_go_on(root, capsys):
    make_folders(root, "abcdefgh")
    save_labels(root / "cam", {"b": drawn(CAM, 1, (8, 6))})
    save_masks(root / "masks", {"d": [drawn(MASK, size=(7, 8))]})
    (root / "masks/e").mkdir()
    (root / "masks/f.json").unlink()
    (root / "images/g.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.new("RGB", SIZE[::-1]).save(root / "images/h.png", exif=exif)
    images = ("--images", root / "images")
    assert enhance(root, *images) == 1
    said = capsys.readouterr().err
    assert set(problems(root)) == {*"bdefgh"} and all(f"\n  {name}: " in said for name in "bdefgh")
    assert sorted(content(root / "out")) == ["a.png", "c.png", "sepl.json"]
    (root / "masks/e").rmdir()
    make_folders(root, "abcdefgh")  # mended
    assert enhance(root, *images) == 0 and enhance(root, *images, output="whole") == 0
    assert content(root / "out") == content(root / "whole")


REFUSED = [
    ["--output", "link"],
    ["--output", "masks/new"],
    ["--output", "file"],
    ["--pseudo-labels", "empty"],
    ["--images", "none"],
    ["--points-per-side", "16"],  # which says nothing of masks that are there
    ["--sam", "tiny"],
    ["--sam", "tiny", "--images", "images", "--mask-cache", "images"],
    ["--sam", "segment_anything", "--images", "images", "--sam-type", "vit_b"],
    ["--masks", "file"],
    # of which argparse says more than a line
    ["--o-p-thresh", "nan"],
    ["--sam", "tiny", "--masks", "x"],
    ["--preset", "voc", "--num-classes", "9"],
]


def test_what_is_refused(root, capsys):
    (root / "empty").mkdir()
    (root / "file").touch()
    (root / "link").symlink_to(root / "cam")
    before = content(root)
    places = ("cam", "masks", "link", "images", "file", "empty", "none")
    for given in REFUSED:
        words = [root / w if w.split("/")[0] in places else w for w in given]
        try:
            status = sepl(*arguments(root, *words))
        except SystemExit as ended:
            status = ended.code
        after = content(root)
        after.pop("out/sepl.json", None)
        assert after == before and status == (2 if given in REFUSED[-3:] else 1), given
        assert re.search("^[A-Z][a-zA-Z]+Error: |: error: ", capsys.readouterr().err, re.M)


def test_finished_images_are_skipped_and_removed_ones_made_again(root, monkeypatch):
    (root / "train.txt").write_text("c\n")
    assert enhance(root, "--list", root / "train.txt") == 0
    stamp = (root / "out" / "c.png").stat().st_mtime_ns
    assert enhance(root) == 0 and enhance(root, output="whole") == 0
    assert (root / "out" / "c.png").stat().st_mtime_ns == stamp
    (root / "out" / "b.png").unlink()
    monkeypatch.chdir(root)  # the same folders by another path are the same settings
    assert sepl("--pseudo-labels", "cam", "--masks", "./masks", "--output", "out") == 0
    assert content(root / "out") == content(root / "whole")


@pytest.mark.parametrize("option", ["--keep-uncovered", "--pseudo-labels", "--masks"])
def test_label_maps_of_other_settings_are_not_replaced_until_overwriting(option, root):
    other = make_folders(root / "other")
    values = {"--pseudo-labels": [other / "cam"], "--masks": [other / "masks"]}
    words = [option, *values.get(option, [])]
    assert enhance(root) == 0
    before = content(root)
    assert enhance(root, *words) == 1 and content(root) == before
    assert enhance(root, "--overwrite", *words) == 0 and enhance(root, *words, output="new") == 0
    assert content(root / "out") == content(root / "new")
    for text in ("{", "{}"):
        (root / "out" / "sepl.json").write_text(text)  # unknown settings
        assert enhance(root) == 1 and (root / "out" / "sepl.json").read_text() == text


def test_changed_labels_and_suffixes_are_noticed_and_only_what_is_listed_is_replaced(root):
    assert enhance(root) == 0
    kept = {name: (root / "out" / f"{name}.png").stat().st_mtime_ns for name in "abc"}
    save_labels(root / "cam", {"b": drawn(CAM, 5)})
    later = kept["b"] + 2 * 10**9
    os.utime(root / "cam" / "b.png", ns=(later, later))
    assert enhance(root) == 0
    np.testing.assert_array_equal(label(root, "b"), drawn(MASK, 5))
    (root / "list.txt").write_text("c.png\n")
    assert enhance(root, "--overwrite", "--list", root / "list.txt") == 0
    now = {name: (root / "out" / f"{name}.png").stat().st_mtime_ns for name in "abc"}
    assert [name for name in "abc" if now[name] == kept[name]] == ["a"]
    for name in "abc":
        (root / "cam" / f"{name}.png").rename(root / "cam" / f"{name}_cam.png")
    assert enhance(root, "--suffix", "_cam") == 1


def test_a_sam_that_cannot_be_loaded_removes_nothing(root):
    assert enhance(root) == 0
    before = content(root)
    words = ("--sam", "segment_anything", "--sam-type", "vit_b", "--sam-checkpoint", "none.pth")
    assert enhance(root, *words, "--images", root / "images", "--overwrite") == 1
    assert content(root) == before


def test_an_interrupted_run_is_continued(root, monkeypatch):
    """What it is to overwrite is gone before: it must not pass for the new settings' result."""
    assert enhance(root, *UNCHANGED) == 0
    original = Enhancement.__getitem__

    def interrupted(self, index):
        if self.names[index] == "b":
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(Enhancement, "__getitem__", interrupted)
    assert enhance(root, "--overwrite") == 130
    assert [path.stem for path in (root / "out").glob("*.png")] == ["a"]
    monkeypatch.undo()
    assert enhance(root) == 0 and enhance(root, output="whole") == 0
    assert content(root / "out") == content(root / "whole")


@pytest.mark.slow
def test_the_script_with_processes_of_its_own(root, tmp_path):
    (root / "masks" / "b.json").unlink()
    words = [ROOT / "tools" / "sepl.py", *arguments(root, "--workers", 2)]
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "  b: " in done.stderr and "Traceback" not in done.stderr
    assert enhance(root, output="serial") == 1
    assert content(root / "out") == content(root / "serial")


FEW = ("--points-per-side", 4, "--pred-iou-thresh", 0.5, "--stability-score-thresh", 0.5)


def test_sams_masks_are_made_once_and_kept(root, tmp_path, monkeypatch):
    """They serve other thresholds, and are read as another program's are."""
    asked, original = [], AutomaticMasks.generate
    monkeypatch.setattr(
        AutomaticMasks, "generate", lambda self, image: asked.append(1) or original(self, image)
    )
    root = tmp_path / "scenes"
    for index in range(2):
        scene = render_scene(5, "val", index, (64, 32))
        save_png(root / "images" / f"{index}.png", scene.image)
        things = scene.instance_ids >= 1000
        save_labels(root / "cam", {index: np.where(np.arange(32)[:, None] % 2, things, 0)})

    def run(*more, output):
        images = ("--images", root / "images", "--sam", "tiny_toyscapes", "--device", "cpu")
        return enhance(root, *images, *FEW, *more, output=output)

    assert run(output="out") == 0 and len(asked) == 2
    kept = root / "out" / "masks"
    assert sorted(content(kept)) == ["0.json.gz", "1.json.gz"]
    assert read_masks(kept, "0", (32, 64))
    assert run("--mask-cache", kept, *UNCHANGED, output="none") == 0
    assert enhance(root, "--masks", kept, output="given") == 0 and len(asked) == 2
    for name in "01":
        np.testing.assert_array_equal(label(root, name), label(root, name, "given"))
        np.testing.assert_array_equal(label(root, name, "none"), label(root, name, "cam"))
    assert run("--box-nms-thresh", 0.6, output="out") == 1
    assert run("--points-per-batch", 8, output="out") == 0  # memory alone
