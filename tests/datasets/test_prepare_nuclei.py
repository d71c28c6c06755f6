"""The Data Science Bowl's folders → COCO, read back by the project's own reader."""

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
    assert [(r["height"], r["width"], len(r["annotations"])) for r in records] == [
        (16, 12, 3),
        (20, 30, 2),
    ]
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


@pytest.mark.parametrize("fault", ["nothing", "no image", "no masks", "size", "damaged"])
def test_what_is_missing_or_damaged_is_named_and_nothing_written(fault, root, tmp_path, capsys):
    file = root / "a" / "masks" / "0.png"
    if fault == "nothing":
        root = tmp_path / "elsewhere"
    elif fault == "no image":
        (root / "a" / "images" / "a.png").unlink()
    elif fault == "no masks":
        for mask in (root / "a" / "masks").iterdir():
            mask.unlink()
    elif fault == "size":
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(file)
    else:
        file.write_bytes(b"no image")
    output = tmp_path / "nuclei.json"
    assert prepare_nuclei.main(["--root", str(root), "--output", str(output)]) == 1
    named = root if fault == "nothing" else file if fault in ("size", "damaged") else root / "a"
    assert str(named) in capsys.readouterr().err and not output.exists()
