"""The command label: folders of images, continued and shared."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import QUICKSTART
from pycocotools.coco import COCO

from s4m_d2.commands import label

from .conftest import overrides
from .test_demo import weights  # noqa: F401


@pytest.fixture(scope="module")
def command(weights, shared_config):  # noqa: F811
    """(folder of images, output, more arguments) → exit status and annotations by file name."""
    run_folder = str(Path(weights(shared_config("unused"))).parents[1])
    options = overrides("unused", {"S4M__PSEUDO_LABEL__MIN_AREA": 0.0})

    def run(images, output, *more):
        words = ["--weights", run_folder, "--images", str(images), "--output", str(output), *more]
        status = label.main(["--config-file", QUICKSTART, "--score", "0", *words, *options])
        return status, annotations(output)

    return run


@pytest.fixture(scope="module")
def whole(command, small_data, tmp_path_factory):
    """The folder of images/ and out/, which a command made of them, and the annotations."""
    folder = tmp_path_factory.mktemp("label")
    (folder / "images" / "sub").mkdir(parents=True)
    scenes = sorted(small_data.glob("toyscapes/leftImg8bit/val/*/*.png"))
    for place, scene in zip(("a.png", "b.png", "sub/a.png"), scenes * 2, strict=False):
        (folder / "images" / place).write_bytes(scene.read_bytes())
    status, found = command(folder / "images", folder / "out")
    assert status == 0 and set(found) == {"a.png", "b.png", "sub/a.png"} and all(found.values())
    return folder, found


@pytest.fixture
def labeled(command, whole, tmp_path):
    """(output, more arguments) → as of command; out/ is a copy of the whole."""
    shutil.copytree(whole[0] / "out", tmp_path / "out")

    def run(output, *more, images=whole[0] / "images"):
        return command(images, tmp_path / output, *more)

    return run


def annotations(folder: Path):
    if not (folder / "annotations.json").exists():
        return None
    coco = COCO(str(folder / "annotations.json"))
    return {
        image["file_name"]: [
            {k: v for k, v in a.items() if k not in ("id", "image_id")}
            for a in coco.imgToAnns[image["id"]]
        ]
        for image in coco.dataset["images"]
    }


def test_a_killed_command_continues_and_processes_share(labeled, whole, tmp_path, monkeypatch):
    _, whole = whole
    assert any("sam_iou" in a for rows in whole.values() for a in rows)
    done = tmp_path / "out" / "labels-0.jsonl"
    lines = done.read_bytes().splitlines(keepends=True)
    done.write_bytes(lines[0] + lines[1][:50])  # torn by a kill
    (tmp_path / "out" / "annotations.json").unlink()
    assert labeled("out") == (0, whole)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert labeled("shared") == (0, None)
    assert label.main(["--merge", "--output", str(tmp_path / "shared")]) == 0
    assert annotations(tmp_path / "shared") == whole


def test_filters_and_images_that_cannot_be_read(labeled, whole, tmp_path, capsys):
    folder, whole = whole
    images = shutil.copytree(folder / "images", tmp_path / "images")
    (images / "b.png").write_bytes(b"no image")
    status, few = labeled("few", "--max-instances", "2", "--min-area", "100", images=images)
    assert status == 1 and "b.png" in capsys.readouterr().err
    for name in ("a.png", "sub/a.png"):
        assert few[name] == [a for a in whole[name] if a["area"] >= 100][:2]
    assert "b.png" not in few
    inside = images / "out"
    (images / "b.png").unlink()
    assert labeled(inside, images=images)[0] == 0
    (inside / "review").mkdir()
    shutil.copy(images / "a.png", inside / "review" / "0001.png")  # a picture of s4m-review
    assert set(labeled(inside, images=images)[1]) == {"a.png", "sub/a.png"}


def test_an_output_of_something_else_stays_as_it_is(labeled, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert labeled("mine") == (1, None) and "not empty" in capsys.readouterr().err
    before = (tmp_path / "out" / "annotations.json").read_bytes()
    assert labeled("out", "--format", "labelme")[0] == 1 and "format" in capsys.readouterr().err
    assert labeled("out", "--score", "0.9")[0] == 1 and "SCORE_THRESH" in capsys.readouterr().err
    assert (tmp_path / "out" / "annotations.json").read_bytes() == before
    assert label.main(["--merge", "--output", str(tmp_path / "mine")]) == 1
    labeled("shapes", "--format", "labelme")
    assert json.loads((tmp_path / "shapes" / "sub" / "a.json").read_text())["shapes"]
