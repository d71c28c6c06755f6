"""The toyscapes generator: determinism, Cityscapes' layout and tools, statistics of the scenes."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import id2label, labels, name2label
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

import make_toyscapes as toyscapes  # noqa: E402
from toyscapes_scene import LABEL_IDS, THING_CLASSES, render_scene  # noqa: E402

COUNTS = {"train": 6, "val": 3}
STATISTICS_SCENES = 80


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "toyscapes"
    assert toyscapes.make_toyscapes(root, seed=5, counts=COUNTS)
    return root


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(0, "train", i) for i in range(STATISTICS_SCENES)]


@pytest.fixture
def labels_of_detectron2(monkeypatch):
    """Detectron2's newest loader imports Cityscapes' labels under a name of its authors' own."""
    alias = "deeplearning.projects.cityscapesApi.cityscapesscripts.helpers.labels"
    parts = alias.split(".")
    for end in range(1, len(parts)):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, alias, sys.modules["cityscapesscripts.helpers.labels"])


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def instances(scene) -> dict[int, np.ndarray]:
    ids = np.unique(scene.instance_ids)
    return {int(i): scene.instance_ids == i for i in ids if i >= 1000}


def test_a_scene_is_a_function_of_seed_split_index_and_size():
    first, again = render_scene(3, "train", 7), render_scene(3, "train", 7)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.instance_ids, again.instance_ids)
    for other in [(4, "train", 7), (3, "val", 7), (3, "train", 8)]:
        assert (render_scene(*other).image != first.image).mean() > 0.5


@pytest.mark.parametrize("size", [(256, 128), (512, 256), (120, 200)])
def test_a_scene_has_the_size_asked_for_and_every_pixel_a_label(size):
    scene = render_scene(1, "train", 0, size)
    assert scene.image.shape == (size[1], size[0], 3) and scene.image.dtype == np.uint8
    assert scene.instance_ids.shape == (size[1], size[0])
    assert set(np.unique(scene.label_ids)) <= set(LABEL_IDS.values())
    for item in scene.objects:
        assert item.polygon.min() >= 0
        assert (item.polygon.max(axis=0) < size).all()


def test_two_runs_and_two_processes_write_the_same_bytes(dataset, tmp_path):
    toyscapes.make_toyscapes(tmp_path / "again", seed=5, counts=COUNTS, workers=2)
    assert content(tmp_path / "again") == content(dataset)


def test_a_larger_data_set_begins_with_the_smaller_one(dataset, tmp_path):
    toyscapes.make_toyscapes(tmp_path / "more", seed=5, counts={"train": 8, "val": 3})
    more = content(tmp_path / "more")
    for name, data in content(dataset).items():
        assert name == toyscapes.PARAMETERS_FILE or more[name] == data


def test_the_layout_is_that_of_cityscapes(dataset):
    for split, count in COUNTS.items():
        images = sorted((dataset / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
        assert len(images) == count
        for path in images:
            city, sequence, frame = path.name.removesuffix("_leftImg8bit.png").split("_")
            assert path.parent.name == city and len(sequence) == len(frame) == 6
            stem = dataset / "gtFine" / split / city / f"{city}_{sequence}_{frame}_gtFine"
            for ending in ("instanceIds.png", "labelIds.png", "polygons.json"):
                assert Path(f"{stem}_{ending}").is_file()
    cities = {s: {p.name for p in (dataset / "leftImg8bit" / s).iterdir()} for s in COUNTS}
    assert len(cities["train"]) > 1 and not cities["train"] & cities["val"]


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


def test_labels_are_cityscapes_real_ones(dataset):
    things = [x.name for x in labels if x.hasInstances and not x.ignoreInEval]
    assert sorted(THING_CLASSES) == sorted(things)
    assert {name: name2label[name].id for name in LABEL_IDS} == LABEL_IDS
    for path in dataset.glob("gtFine/*/*/*_instanceIds.png"):
        ids = np.unique(np.asarray(Image.open(path)))
        assert all(id2label[i].hasInstances is False for i in ids[ids < 1000].tolist())
        assert all(id2label[i // 1000].hasInstances for i in ids[ids >= 1000].tolist())


@pytest.mark.parametrize("from_json", [True, False])
def test_the_engines_cityscapes_loader_reads_it(dataset, labels_of_detectron2, from_json):
    pytest.importorskip("shapely")
    from detectron2.data.datasets.cityscapes import load_cityscapes_instances

    dicts = load_cityscapes_instances(
        str(dataset / "leftImg8bit" / "val"), str(dataset / "gtFine" / "val"), from_json=from_json
    )
    assert len(dicts) == COUNTS["val"]
    for record in dicts:
        stem = Path(record["file_name"]).name.removesuffix("leftImg8bit.png")
        path = next(dataset.glob(f"gtFine/val/*/{stem}gtFine_instanceIds.png"))
        ids = np.unique(np.asarray(Image.open(path)))
        assert (record["height"], record["width"]) == (128, 256)
        order = [x.id for x in labels if x.hasInstances and not x.ignoreInEval]
        found = sorted(order[a["category_id"]] for a in record["annotations"])
        assert found == sorted(int(i) // 1000 for i in ids if i >= 1000)


def test_every_class_is_common_and_the_frequencies_are_unequal(scenes):
    count = Counter(i // 1000 for scene in scenes for i in instances(scene))
    per_40_images = {k: v * 40 / STATISTICS_SCENES for k, v in count.items()}
    assert len(per_40_images) == len(THING_CLASSES)
    assert min(per_40_images.values()) >= 15
    assert max(per_40_images.values()) >= 2 * min(per_40_images.values())


def test_scenes_hold_four_to_nine_instances_most_of_them_over_100_px(scenes):
    numbers = [len(instances(scene)) for scene in scenes]
    assert 4 <= np.mean(numbers) <= 9 and max(numbers) <= 9
    assert np.mean([n >= 4 for n in numbers]) > 0.9
    areas = np.array([m.sum() for scene in scenes for m in instances(scene).values()])
    assert (areas >= 100).mean() > 0.8  # Cityscapes ignores smaller ones
    assert (areas < 100).any() and (areas > 2000).any()
    assert areas.min() >= 12


def test_masks_lie_exactly_on_the_figures(scenes):
    """Moved by a pixel in any direction, the masks fit the colorful figures less well."""
    shifts = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    scores = np.zeros(len(shifts))
    for scene in scenes:
        saturation = np.ptp(scene.image.astype(int), axis=2)[2:-2, 2:-2]
        things = scene.instance_ids >= 1000
        for number, shift in enumerate(shifts):
            moved = np.roll(things, shift, axis=(0, 1))[2:-2, 2:-2]
            scores[number] += np.corrcoef(saturation.ravel(), moved.ravel())[0, 1]
    assert shifts[int(scores.argmax())] == (0, 0)


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


def test_a_run_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("disk is full")

    monkeypatch.setattr(toyscapes, "write_scene", broken)
    with pytest.raises(RuntimeError, match="disk is full"):
        toyscapes.make_toyscapes(tmp_path / "toyscapes", counts=COUNTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (32, 128)}, "at least 64"),
        ({"counts": {"train": 0, "val": 0}}, "at least one image"),
        ({"counts": {"train": -1}}, "at least one image"),
        ({"counts": {"test": 5}}, "train or val"),
        ({"seed": -1}, "must not be negative"),
    ],
)
def test_parameters_out_of_range_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toyscapes.make_toyscapes(tmp_path / "t", **{"counts": COUNTS, **change})
    assert list(tmp_path.iterdir()) == []
