"""Loading COCO json files and Cityscapes annotations from small hand-made data sets."""

import importlib
import json
import sys
import types

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.structures import BoxMode

SQUARE = [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]


@pytest.fixture
def name():
    yield "data_datasets_test"
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "data_datasets_test" in catalog:
            catalog.remove("data_datasets_test")


def _annotation(index, **fields):
    box = [1.0, 1.0, 3.0, 2.0]
    default = {"id": index, "image_id": 2, "category_id": 5, "bbox": box, "iscrowd": 0, "area": 6}
    return {**default, "segmentation": [SQUARE], **fields}


def _write_coco(folder, annotations):
    content = {
        "images": [
            {"id": 2, "file_name": "two.png", "width": 6, "height": 4},
            {"id": 1, "file_name": "one.png", "width": 6, "height": 5},
        ],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_coco_records_follow_the_image_ids_and_categories_become_contiguous(tmp_path, name):
    path = _write_coco(tmp_path, [_annotation(1), _annotation(2, category_id=9, iscrowd=1)])
    register_coco_instances(name, {"note": "x"}, path, str(tmp_path))
    first, second = DatasetCatalog.get(name)
    assert first == {
        "file_name": str(tmp_path / "one.png"),
        "height": 5,
        "width": 6,
        "image_id": 1,
        "annotations": [],
    }
    cat, dog = second["annotations"]
    assert (cat["category_id"], dog["category_id"]) == (0, 1)
    assert (cat["iscrowd"], dog["iscrowd"]) == (0, 1)
    assert cat["bbox"] == [1.0, 1.0, 3.0, 2.0] and cat["bbox_mode"] == BoxMode.XYWH_ABS
    assert cat["segmentation"] == [SQUARE]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert (metadata.note, metadata.evaluator_type, metadata.json_file) == ("x", "coco", path)


def test_coco_without_a_name_keeps_the_ids(tmp_path):
    path = _write_coco(tmp_path, [_annotation(1, category_id=77)])
    [annotation] = load_coco_json(path, "")[1]["annotations"]
    assert annotation["category_id"] == 77


def test_coco_segmentations_lose_bad_polygons_and_get_compressed(tmp_path):
    mask = np.zeros((4, 6), np.uint8, order="F")
    mask[1:3, 2:5] = 1
    counts = [9, 2, 2, 2, 2, 2, 5]  # column by column, zeros first
    bad = [1.0, 1.0, 2.0, 2.0]
    annotations = [
        _annotation(1, segmentation=[bad, SQUARE, SQUARE + [1.0]]),
        _annotation(2, segmentation=[bad]),
        _annotation(3, segmentation={"size": [4, 6], "counts": counts}),
        _annotation(4, segmentation=[]),
    ]
    loaded = load_coco_json(_write_coco(tmp_path, annotations), "")[1]["annotations"]
    assert len(loaded) == 3  # the second has no valid polygon
    assert loaded[0]["segmentation"] == [SQUARE]
    np.testing.assert_array_equal(mask_util.decode(loaded[1]["segmentation"]), mask)
    assert "segmentation" not in loaded[2]


@pytest.mark.parametrize(
    "annotations, error",
    [
        ([_annotation(1), _annotation(1)], AssertionError),
        ([_annotation(1, ignore=1)], AssertionError),
        ([_annotation(1, category_id=6)], KeyError),
        ([_annotation(1, bbox=[])], ValueError),
    ],
)
def test_coco_mistakes_are_errors(tmp_path, name, annotations, error):
    with pytest.raises(error):
        load_coco_json(_write_coco(tmp_path, annotations), "", name)


@pytest.fixture
def cityscapes_tools(monkeypatch):
    """Detectron2's main branch imports cityscapesscripts under a name of its authors' own."""
    alias = "deeplearning.projects.cityscapesApi.cityscapesscripts.helpers"
    parts = alias.split(".")
    for end in range(1, len(parts) + 1):
        module = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    labels = importlib.import_module("cityscapesscripts.helpers.labels")
    monkeypatch.setitem(sys.modules, f"{alias}.labels", labels)


def _rectangle(label, x0, y0, x1, y1, **fields):
    corners = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    return {"label": label, "polygon": corners, **fields}


def _write_cityscapes(root, objects, instance_ids):
    image_dir, gt_dir = root / "leftImg8bit", root / "gtFine"
    for city in ("ulm", "aachen"):
        (image_dir / city).mkdir(parents=True)
        (gt_dir / city).mkdir(parents=True)
        stem = f"{city}_000000_000019_"
        cv2.imwrite(str(image_dir / city / f"{stem}leftImg8bit.png"), np.zeros(SIZE, np.uint8))
        stem = str(gt_dir / city / f"{stem}gtFine_")
        cv2.imwrite(f"{stem}instanceIds.png", instance_ids)
        cv2.imwrite(f"{stem}labelIds.png", np.zeros(SIZE, np.uint8))
        content = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": objects}
        with open(f"{stem}polygons.json", "w") as file:
            json.dump(content, file)
    return str(image_dir), str(gt_dir)


SIZE = (20, 40)


def _rasterize(polygons):
    rles = mask_util.frPyObjects([list(p) for p in polygons], *SIZE)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


def test_cityscapes_polygons_are_dilated_and_occluded_by_later_objects(tmp_path, cityscapes_tools):
    objects = [
        _rectangle("car", 2, 3, 11, 12),
        _rectangle("person", 8, 2, 11, 13),  # in front of the car
        _rectangle("pole", 2, 2, 4, 13),  # no instance class, but in front of the car too
        _rectangle("cargroup", 20, 3, 29, 12),
        _rectangle("bus", 30, 3, 33, 6, deleted=1),
        _rectangle("license plate", 8, 3, 11, 12),  # has no id of its own: hides nothing
        _rectangle("rider", 30, 10, 33, 12),
        _rectangle("building", 29, 9, 35, 15),  # hides the rider
    ]
    folders = _write_cityscapes(tmp_path, objects, np.zeros(SIZE, np.uint16))
    records = sorted(load_cityscapes_instances(*folders), key=lambda record: record["image_id"])
    assert [r["image_id"] for r in records] == [
        "aachen_000000_000019_leftImg8bit.png",
        "ulm_000000_000019_leftImg8bit.png",
    ]
    record = records[0]
    assert record["file_name"].endswith("leftImg8bit/aachen/" + record["image_id"])
    assert (record["height"], record["width"]) == SIZE

    group, person, car = record["annotations"]  # from the front to the back
    assert [(bool(a["iscrowd"]), a["category_id"]) for a in (group, person, car)] == [
        (True, 2),
        (False, 0),
        (False, 2),
    ]
    assert all(a["bbox_mode"] == BoxMode.XYXY_ABS for a in (group, person, car))
    # Coordinates are pixel centers, and the border pixels belong to the object.
    np.testing.assert_allclose(person["bbox"], (8, 2, 12, 14))
    np.testing.assert_allclose(car["bbox"], (5, 3, 8, 13))
    expected = np.zeros(SIZE, bool)
    expected[3:13, 5:8] = True
    np.testing.assert_array_equal(_rasterize(car["segmentation"]), expected)


def test_cityscapes_instance_ids(tmp_path, cityscapes_tools):
    ids = np.full(SIZE, 7, np.uint16)  # road
    ids[2:6, 3:9] = 26001  # a car
    ids[2:6, 20:30] = 26  # a group of cars
    ids[10:16, 5:8] = 24000  # a person
    ids[10:16, 5] = 26001  # in front of which the car goes on
    ids[10, 30:35] = 33002  # one pixel high: dropped
    ids[12:14, 30:35] = 29000  # a caravan: not evaluated
    folders = _write_cityscapes(tmp_path, [], ids)
    records = load_cityscapes_instances(*folders, from_json=False)
    annotations = records[0]["annotations"]
    assert [(bool(a["iscrowd"]), a["category_id"], tuple(a["bbox"])) for a in annotations] == [
        (True, 2, (20, 2, 29, 5)),
        (False, 0, (6, 10, 7, 15)),
        (False, 2, (3, 2, 8, 15)),
    ]
    assert len(annotations[1]["segmentation"]) == 1
    assert all(len(p) % 2 == 0 and len(p) >= 6 for p in annotations[1]["segmentation"])
