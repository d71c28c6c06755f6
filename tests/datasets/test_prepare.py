"""The checks of downloaded data sets: what is missing is named with its archive."""

import json

import prepare_cityscapes as cityscapes
import prepare_coco as coco
import pytest

EXPECTED = {"train": 3, "val": 2}


def touch(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path):
    """Both data sets, complete."""
    for split, count in EXPECTED.items():
        for index in range(count):
            folder = tmp_path / "cityscapes"
            touch(folder / f"leftImg8bit/{split}/aachen/a_{index}_leftImg8bit.png")
            for suffix in cityscapes.ANNOTATION_SUFFIXES:
                touch(folder / f"gtFine/{split}/aachen/a_{index}{suffix}")
            touch(tmp_path / f"coco/{split}2017/{index}.jpg")
        content = json.dumps({"images": [{"file_name": f"{i}.jpg"} for i in range(count)]})
        touch(tmp_path / f"coco/annotations/instances_{split}2017.json", content)
    return tmp_path


GT = "cityscapes/gtFine"
MISSING = [  # of either data set: what is gone, what its problems name
    (cityscapes, f"{GT}/train/aachen/a_1_gtFine_instanceIds.png", "a_1"),
    (cityscapes, f"{GT}/val/aachen/a_0_gtFine_polygons.json", "polygons.json"),
    (cityscapes, "cityscapes/leftImg8bit/train/aachen/a_0_leftImg8bit.png", "leftImg8bit"),
    (cityscapes, GT, "gtFine"),
    (coco, "coco/train2017/1.jpg", "train2017.zip"),
    (coco, "coco/annotations/instances_val2017.json", "annotations_trainval2017"),
    (coco, "coco/val2017", "val2017.zip"),
]


@pytest.mark.parametrize(("module", "gone", "named"), MISSING)
def test_what_is_missing_is_named(root, module, gone, named):
    assert module.check(root, EXPECTED) == []
    (root / gone).rename(root / "elsewhere")
    problems = module.check(root, EXPECTED)
    assert problems and named in "\n".join(problems)


def test_archives_that_are_there_are_to_be_unpacked_and_damage_is_named(root):
    (root / GT).rename(root / "elsewhere")
    touch(root / "gtFine_trainvaltest.zip")
    [problem] = cityscapes.check(root, EXPECTED)
    assert "gtFine_trainvaltest.zip" in problem and "unzip -d" in problem
    touch(root / "coco/annotations/instances_val2017.json", "{")
    [problem] = coco.check(root, EXPECTED)
    assert "instances_val2017.json" in problem


def test_the_exit_status_tells(root, monkeypatch):
    for module in (cityscapes, coco):
        monkeypatch.setattr(module.check, "__defaults__", (EXPECTED,))
        assert module.main(["--root", str(root)]) == 0
        assert module.main(["--root", str(root / "nowhere")]) == 1
