import importlib.util
import json
import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "datasets"
IDS = "_gtFine_instanceIds.png"
EXPECTED = {"train": 3, "val": 2}


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cityscapes, coco = script("prepare_cityscapes"), script("prepare_coco")


def touch(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def cityscapes_root(tmp_path):
    for split, count in EXPECTED.items():
        for index in range(count):
            folder = tmp_path / "cityscapes"
            touch(folder / f"leftImg8bit/{split}/aachen/a_{index}_leftImg8bit.png")
            for suffix in cityscapes.ANNOTATION_SUFFIXES:
                touch(folder / f"gtFine/{split}/aachen/a_{index}{suffix}")
    return tmp_path


@pytest.fixture
def coco_root(tmp_path):
    for split, count in EXPECTED.items():
        images = [{"file_name": f"{index}.jpg"} for index in range(count)]
        for image in images:
            touch(tmp_path / f"coco/{split}2017" / image["file_name"])
        content = json.dumps({"images": images})
        touch(tmp_path / f"coco/annotations/instances_{split}2017.json", content)
    return tmp_path


def test_complete_data_sets_have_no_problems(cityscapes_root, coco_root):
    assert cityscapes.check(cityscapes_root, EXPECTED) == []
    assert coco.check(coco_root, EXPECTED) == []


def remove(pattern):
    def spoil(root):
        for path in sorted(root.rglob(pattern)):
            path.unlink()

    return spoil


def archive_only(part, archive):
    def spoil(root):
        for path in root.glob(part):
            path.rename(root / "elsewhere")
        touch(root / archive)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (
            remove("train/aachen/a_1_gtFine_instanceIds.png"),
            [r"instanceIds.png lacks 1 .*a_1\).*gtFine_t"],
        ),
        (
            lambda root: touch(root / f"cityscapes/gtFine/val/aachen/a_0{IDS}", ""),
            [r"instanceIds.png lacks 1"],
        ),
        (remove("val/aachen/a_*_gtFine_polygons.json"), [r"val/\*_gtFine_polygons.json lacks 2"]),
        (
            remove("train/aachen/a_0_leftImg8bit.png"),
            ["leftImg8bit/train has 2 images, expected 3", *["lacks 1 .*a_0.*leftImg8bit_t"] * 3],
        ),
        (
            archive_only("cityscapes/gtFine", "gtFine_trainvaltest.zip"),
            [r"gtFine_trainvaltest.zip is not unpacked: run  unzip -d .*cityscapes "],
        ),
        (
            archive_only("cityscapes", "other.zip"),
            [r"leftImg8bit is missing: .*cityscapes-dataset.com", r"gtFine is missing: .*\.com"],
        ),
    ],
)
def test_problems_of_cityscapes(cityscapes_root, spoil, found):
    spoil(cityscapes_root)
    problems = cityscapes.check(cityscapes_root, EXPECTED)
    assert len(problems) == len(found), problems
    for problem, pattern in zip(problems, found, strict=True):
        assert re.search(pattern, problem)


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (
            remove("train2017/1.jpg"),
            ["train2017 holds 2 files, expected 3.*train2017.zip", r"lacks 1 images.*\(1.jpg\)"],
        ),
        (
            remove("instances_val2017.json"),
            ["instances_val2017.json is missing.*annotations_trainval2017"],
        ),
        (
            lambda r: touch(r / "coco/annotations/instances_val2017.json", "{"),
            ["instances_val2017.json is damaged"],
        ),
        (
            archive_only("coco/val2017", "coco/val2017.zip"),
            ["val2017.zip is not unpacked: run  unzip -d"],
        ),
        (archive_only("coco/val2017", "x.zip"), ["val2017 is missing: get http.*val2017.zip"]),
    ],
)
def test_problems_of_coco(coco_root, spoil, found):
    spoil(coco_root)
    problems = coco.check(coco_root, EXPECTED)
    assert len(problems) == len(found), problems
    for problem, pattern in zip(problems, found, strict=True):
        assert re.search(pattern, problem)


@pytest.mark.parametrize("module", [cityscapes, coco])
def test_the_exit_status_tells(module, cityscapes_root, coco_root, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(cityscapes_root / "nowhere"))
    assert module.main([]) == 1
    assert "missing: " in capsys.readouterr().out
    monkeypatch.setattr(module.check, "__defaults__", (EXPECTED,))
    assert module.main(["--root", str(cityscapes_root)]) == 0
    assert "is complete" in capsys.readouterr().out
