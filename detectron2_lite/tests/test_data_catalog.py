"""Catalogs and the builtin data sets."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture
def name():
    yield "data_catalog_test"
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "data_catalog_test" in catalog:
            catalog.remove("data_catalog_test")


def test_a_registered_function_is_called_at_each_get(name):
    calls = []
    DatasetCatalog.register(name, lambda: calls.append(1) or [{"file_name": "a.png"}])
    assert calls == []
    assert DatasetCatalog.get(name) == DatasetCatalog.get(name) == [{"file_name": "a.png"}]
    assert calls == [1, 1]
    assert name in DatasetCatalog.list()


def test_a_name_can_be_registered_once(name):
    DatasetCatalog.register(name, list)
    with pytest.raises(AssertionError, match=name):
        DatasetCatalog.register(name, list)
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, list)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(KeyError, match="coco_2017_val"):
        DatasetCatalog.get("no_such_dataset")


def test_metadata_keeps_its_first_values(name):
    metadata = MetadataCatalog.get(name).set(thing_classes=["cat"], evaluator_type="coco")
    metadata.thing_classes = ["cat"]  # an equal value is no change
    with pytest.raises(AssertionError, match=name):
        metadata.thing_classes = ["dog"]
    with pytest.raises(AssertionError):
        metadata.name = "other"
    assert MetadataCatalog.get(name) is metadata
    assert metadata.as_dict() == {
        "name": name,
        "thing_classes": ["cat"],
        "evaluator_type": "coco",
    }


def test_missing_metadata_is_an_attribute_error_or_the_default(name):
    metadata = MetadataCatalog.get(name)
    with pytest.raises(AttributeError, match="empty"):
        _ = metadata.thing_classes
    metadata.evaluator_type = "coco"
    with pytest.raises(AttributeError, match="evaluator_type"):
        _ = metadata.thing_classes
    assert metadata.get("thing_classes") is None
    assert metadata.get("thing_classes", 3) == 3
    assert metadata.get("evaluator_type", 3) == "coco"
    metadata.as_dict()["thing_classes"] = []
    assert not hasattr(metadata, "thing_classes")


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_2017_is_registered_with_its_80_classes(split):
    metadata = MetadataCatalog.get(f"coco_2017_{split}")
    id_map = metadata.thing_dataset_id_to_contiguous_id
    classes = metadata.thing_classes
    assert f"coco_2017_{split}" in DatasetCatalog
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file.endswith(f"coco/annotations/instances_{split}2017.json")
    assert metadata.image_root.endswith(f"coco/{split}2017")
    assert len(set(classes)) == len(id_map) == len(metadata.thing_colors) == 80
    assert sorted(id_map.values()) == list(range(80))
    assert [classes[id_map[i]] for i in (1, 13, 90)] == ["person", "stop sign", "toothbrush"]
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(id_map)  # ids COCO left out
    assert list(metadata.thing_colors[0]) == [220, 20, 60]


@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes_is_registered_with_its_8_things(split):
    metadata = MetadataCatalog.get(f"cityscapes_fine_instance_seg_{split}")
    assert f"cityscapes_fine_instance_seg_{split}" in DatasetCatalog
    assert metadata.evaluator_type == "cityscapes_instance"
    assert metadata.thing_classes == [
        "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ]  # fmt: skip
    assert metadata.image_dir.rstrip("/").endswith(f"leftImg8bit/{split}")
    assert metadata.gt_dir.rstrip("/").endswith(f"gtFine/{split}")
