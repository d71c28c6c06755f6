"""The Data Science Bowl's folders → COCO, read back by the project's own reader."""

import shutil
from pathlib import Path

import numpy as np
import prepare_nuclei
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from s4m_d2.data import CocoFormat

SIZES = {"b": (20, 30), "a": (16, 12)}  # (H, W)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "stage1_train"
    for number, (name, size) in enumerate(SIZES.items(), start=1):
        for part in ("images", "masks"):
            (root / name / part).mkdir(parents=True)
        Image.fromarray(np.full((*size, 4), 90, np.uint8)).save(root / name / f"images/{name}.png")
        for index in range(number + 1):
            mask = np.zeros(size, np.uint8)
            mask[index * 5 : index * 5 + 3, 2:6] = 255
            Image.fromarray(mask).save(root / name / "masks" / f"{index}.png")
        Image.fromarray(np.zeros(size, np.uint8)).save(root / name / "masks" / "empty.png")
    return root


def test_every_nucleus_arrives_with_its_pixels(root, tmp_path):
    output = tmp_path / "nuclei.json"
    assert prepare_nuclei.main(["--root", str(root), "--output", str(output)]) == 0
    records = CocoFormat(str(output), str(root)).load(list)[0]
    assert [Path(r["file_name"]).name for r in records] == ["a.png", "b.png"]
    found = [(r["height"], r["width"], len(r["annotations"])) for r in records]
    assert found == [(16, 12, 3), (20, 30, 2)]
    last = records[0]["annotations"][2]
    expected = np.zeros((16, 12), np.uint8)
    expected[10:13, 2:6] = 1
    assert np.array_equal(mask_utils.decode(last["segmentation"]), expected)
    assert last["bbox"] == [2, 10, 4, 3]


def test_a_part_is_drawn_for_validation_and_nothing_is_in_both(root, tmp_path):
    output = tmp_path / "nuclei"
    assert prepare_nuclei.main(["--root", str(root), "--output", str(output), "--val", "1"]) == 0
    found = []
    for split in ("train", "val"):
        records = CocoFormat(str(output / f"{split}.json"), str(output / split)).load(list)[0]
        assert all(Path(record["file_name"]).is_file() for record in records)
        found.append({Path(r["file_name"]).name: len(r["annotations"]) for r in records})
    assert sorted(map(len, found)) == [1, 1] and found[0] | found[1] == {"a.png": 3, "b.png": 2}


FAULTS = {  # what is done, and what is named
    "nothing": (shutil.rmtree, ""),
    "no image": (lambda root: (root / "a/images/a.png").unlink(), "a"),
    "no masks": (lambda root: [mask.unlink() for mask in (root / "a/masks").iterdir()], "a"),
    "size": (lambda root: Image.new("L", (6, 5)).save(root / "a/masks/0.png"), "a/masks/0.png"),
    "damaged": (lambda root: (root / "a/masks/0.png").write_bytes(b"x"), "a/masks/0.png"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_or_damaged_is_named_and_nothing_written(fault, root, tmp_path, capsys):
    spoil, named = FAULTS[fault]
    spoil(root)
    output = tmp_path / "nuclei.json"
    assert prepare_nuclei.main(["--root", str(root), "--output", str(output)]) == 1
    assert str(root / named) in capsys.readouterr().err and not output.exists()
