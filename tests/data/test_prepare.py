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


PROBLEMS = {
    "cityscapes": [
        (remove("train/aachen/a_1_gtFine_instanceIds.png"), ["a_1.*gtFine_t"]),
        (lambda root: touch(root / f"cityscapes/gtFine/val/aachen/a_0{IDS}", ""), ["a_0"]),
        (remove("val/aachen/a_*_gtFine_polygons.json"), ["val/.*polygons.json lacks 2"]),
        (
            remove("train/aachen/a_0_leftImg8bit.png"),
            ["leftImg8bit/train has 2 images, expected 3", *["a_0.*leftImg8bit_t"] * 3],
        ),
        (
            archive_only("cityscapes/gtFine", "gtFine_trainvaltest.zip"),
            [r"gtFine_trainvaltest.zip .* unzip -d .*cityscapes "],
        ),
        (archive_only("cityscapes", "other.zip"), ["leftImg8bit is missing", "gtFine is missing"]),
    ],
    "coco": [
        (remove("train2017/1.jpg"), ["2 files, expected 3.*train2017.zip", r"lacks 1 .*\(1.jpg\)"]),
        (remove("instances_val2017.json"), ["missing.*annotations_trainval2017"]),
        (lambda r: touch(r / "coco/annotations/instances_val2017.json", "{"), ["val2017.json"]),
        (archive_only("coco/val2017", "coco/val2017.zip"), [r"val2017.zip .* unzip -d"]),
        (archive_only("coco/val2017", "x.zip"), ["val2017 is missing: get http.*val2017.zip"]),
    ],
}


@pytest.mark.parametrize(
    ("name", "row"), [(name, row) for name, rows in PROBLEMS.items() for row in range(len(rows))]
)
def test_each_problem_is_named_with_its_archive(cityscapes_root, coco_root, name, row):
    module, root = (cityscapes, cityscapes_root) if name == "cityscapes" else (coco, coco_root)
    assert module.check(root, EXPECTED) == []
    spoil, found = PROBLEMS[name][row]
    spoil(root)
    problems = module.check(root, EXPECTED)
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
