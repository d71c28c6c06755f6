"""The toyscapes generator: determinism, Cityscapes' layout and tools, statistics of the scenes."""

from __future__ import annotations

import json
from pathlib import Path

import make_toyscapes as toyscapes
import numpy as np
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from helpers import content
from PIL import Image
from toyscapes_scene import LABEL_IDS, render_scene

COUNTS = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "toyscapes"
    assert toyscapes.make_toyscapes(root, seed=5, counts=COUNTS)
    return root


def test_a_scene_is_a_function_of_seed_split_index_and_size():
    first, again = render_scene(3, "train", 7), render_scene(3, "train", 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.instance_ids, again.instance_ids)
    for other in [(4, "train", 7), (3, "val", 7), (3, "train", 8)]:
        assert (render_scene(*other).image != first.image).mean() > 0.5
    for size in ((256, 128), (120, 200)):
        scene = render_scene(1, "train", 0, size)
        assert scene.image.shape == (size[1], size[0], 3) and scene.image.dtype == np.uint8
        assert scene.instance_ids.shape == (size[1], size[0])
        assert set(np.unique(scene.label_ids)) <= set(LABEL_IDS.values())


def test_two_runs_and_two_processes_write_the_same_bytes(dataset, tmp_path):
    toyscapes.make_toyscapes(tmp_path / "again", seed=5, counts=COUNTS, workers=2)
    assert content(tmp_path / "again") == content(dataset)


def test_cityscapes_own_tools_draw_the_same_maps_from_the_polygons(dataset):
    for path in sorted(dataset.glob("gtFine/*/*/*_polygons.json")):
        annotation = Annotation()
        annotation.fromJsonFile(str(path))
        for ending, draw, dtype in [
            ("instanceIds.png", createInstanceImage, np.uint16),
            ("labelIds.png", createLabelImage, np.uint8),
        ]:
            written = np.asarray(Image.open(str(path).replace("polygons.json", ending)))
            assert written.dtype == dtype
            np.testing.assert_array_equal(written, np.asarray(draw(annotation, "ids")))


def test_an_existing_data_set_with_the_same_parameters_is_left_alone(dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    assert not toyscapes.make_toyscapes(dataset, seed=5, counts=COUNTS, overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before


def test_anything_else_is_replaced_only_when_asked(tmp_path, capsys):
    output = tmp_path / "toyscapes"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    arguments = ["--output", str(output), "--train", "1", "--val", "0"]
    assert toyscapes.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (output / "mine.txt").read_text() == "precious"
    assert toyscapes.main([*arguments, "--overwrite"]) == 0
    assert not (output / "mine.txt").exists()
    parameters = json.loads((output / toyscapes.PARAMETERS_FILE).read_text())
    assert parameters["counts"] == {"train": 1, "val": 0}
    assert [p.name for p in tmp_path.iterdir()] == ["toyscapes"]


def test_parameters_out_of_range_are_refused(tmp_path):
    counts = ({"train": 0, "val": 0}, {"train": -1}, {"test": 5})
    for change in ({"size": (32, 128)}, {"seed": -1}, *({"counts": of} for of in counts)):
        with pytest.raises(ValueError):
            toyscapes.make_toyscapes(tmp_path / "t", **{"counts": COUNTS, **change})
        assert list(tmp_path.iterdir()) == []
