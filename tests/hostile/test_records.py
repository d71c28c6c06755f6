"""Data sets of a user's own, whose loaders return or raise what they should not."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.engine.checks.dataset_checks import check_datasets
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import DatasetError

from .rows import BOX_POLYGON, HEIGHT, WIDTH, one_error, save, scene

NAME = "hostile_records"


@pytest.fixture
def check(tmp_path):
    """Loader of records -> what the check before training says."""
    save(tmp_path / "a.png", scene())

    def run(load):
        DatasetCatalog.register(NAME, lambda: load(record(tmp_path)))
        words = ["DATASETS.TRAIN", f"('{NAME}',)", "S4M.STAGE", "teacher", "INPUT.FORMAT", "RGB"]
        check_datasets(load_config("", [*words, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"]))

    yield run
    DatasetCatalog.remove(NAME)
    if NAME in MetadataCatalog.list():
        MetadataCatalog.remove(NAME)


def record(folder):
    annotation = {"category_id": 1, "segmentation": [BOX_POLYGON], "iscrowd": 0}
    path = str(folder / "a.png")
    return {"file_name": path, "height": HEIGHT, "width": WIDTH, "annotations": [annotation]}


def without(key):
    return lambda record: [{name: value for name, value in record.items() if name != key}]


def annotated(**changes):
    return lambda record: [{**record, "annotations": [{**record["annotations"][0], **changes}]}]


def raising(error):
    def load(record):
        raise error

    return load


def nested(record):
    return json.loads("[" * 100_000)


LOADERS = {
    "nothing": (lambda record: [], "has no images"),
    "null": (lambda record: None, "has no images"),
    "paths": (lambda record: [record["file_name"]], "record 0 has no 'file_name'"),
    "record without a path": (without("file_name"), "record 0 has no 'file_name'"),
    "no annotations": (without("annotations"), "no instance"),
    "class out of range": (annotated(category_id=2), "class id 2; expected one from 0 to 1"),
    "no mask": (annotated(segmentation=None), "a.png.*NoneType"),
    "mask far outside": (annotated(segmentation=[[9e9] * 6]), "a.png.*far outside"),
    "other size": (lambda record: [{**record, "height": 7}], r"a.png.*\(7, 40\)"),
    "missing file": (raising(FileNotFoundError(2, "gone", "x.json")), "cannot be loaded.*x.json"),
    "division": (raising(ZeroDivisionError("by zero")), "cannot be loaded.*by zero"),
    "nested too deep": (nested, "cannot be loaded.*recursion"),
}


@pytest.mark.parametrize("row", LOADERS)
def test_loaders_of_a_users_own_are_refused_before_training(check, row):
    load, says = LOADERS[row]
    with one_error(DatasetError, f"{NAME}|a.png", says):
        check(load)


def test_a_sound_loader_passes(check):
    check(lambda record: [record])
