"""Data sets: counts by hand, and every defect is named before training."""

import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from helpers import key_values
from PIL import Image

from s4m_d2.data import ARPDatasetMapper
from s4m_d2.data.images import unlabeled_records
from s4m_d2.engine.checks.preflight import dataset_findings
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.training.trainer import TeacherTrainer
from s4m_d2.errors import ConfigError, DatasetError, raise_all

CLASSES = ["person", "car"]
VALID = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(CLASSES),
    "INPUT.MIN_SIZE_TRAIN": (24,),
    "INPUT.CROP.SIZE": (24, 24),
    "DATASETS.TRAIN": ("preflight_labeled",),
    "DATASETS.UNLABELED": ("preflight_unlabeled",),
    "DATASETS.TEST": ("preflight_test",),
    "S4M.BURN_IN": 100,
    "SOLVER.MAX_ITER": 1000,
}
HEIGHT, WIDTH = 20, 30


def config(changes=None):
    """A sound one, with ``changes``."""
    return load_config("toyscapes_10pct", key_values(VALID | (changes or {})))


def record(folder, number, labels=(0,)):
    path = folder / f"{number}.png"
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), number, dtype=np.uint8)).save(path)
    square = {"bbox": [2, 2, 10, 10], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0}
    square["segmentation"] = [[2, 2, 10, 2, 10, 10, 2, 10]]
    annotations = [square | {"category_id": label} for label in labels]
    about = {"file_name": str(path), "image_id": number, "height": HEIGHT, "width": WIDTH}
    return {**about, "annotations": annotations}


@pytest.fixture
def sets(tmp_path):
    """Records of the three data sets of VALID; a test may change them before they are loaded."""
    records = {
        "preflight_labeled": [record(tmp_path, n, labels=(0, 1)) for n in range(3)],
        "preflight_unlabeled": [record(tmp_path, n) for n in range(6)],
        "preflight_test": [record(tmp_path, n) for n in (7, 8)],
    }
    for unlabeled in records["preflight_unlabeled"]:
        del unlabeled["annotations"]
    for name in records:
        DatasetCatalog.register(name, lambda name=name: records[name])
        MetadataCatalog.get(name).set(thing_classes=CLASSES)
    yield records
    for name in records:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def lines(changes=None):
    return {finding.item: finding for finding in dataset_findings(config(changes))}


def check_datasets(cfg):
    raise_all(error for finding in dataset_findings(cfg) for error in finding.errors)


def test_instances_are_counted_by_image_and_class_and_images_decoded(sets, tmp_path):
    sets["preflight_labeled"][:] = [
        record(tmp_path, n, labels) for n, labels in enumerate([(0, 0, 1), (0,), (), (1, 0)])
    ]
    sets["preflight_labeled"][1]["annotations"].append(
        record(tmp_path, 1, (1,))["annotations"][0] | {"iscrowd": 1}
    )
    found = lines()
    numbers = {item: re.findall(r"\d[\d.]*", finding.text) for item, finding in found.items()}
    # Images and instances; the least, mean and most of an image; images decoded.
    assert numbers["labeled data"] == ["4", "6", "0", "1.5", "3", "4"]
    assert numbers["test data"] == ["2", "2", "1", "1.0", "1", "2"]
    assert numbers["unlabeled data"] == ["6", "6"]
    assert found["labeled classes"].text == "person 4, car 2"
    assert {finding.status for finding in found.values()} == {"ok"}
    check_datasets(config())


def cut(path):
    with open(path, "rb+") as file:
        file.truncate(60)


def test_a_damaged_image_is_named_in_a_test_too(sets):
    cut(sets["preflight_test"][1]["file_name"])
    for changes in ({}, {"INPUT.TILE.SIZE": 16}):
        cfg = config(changes | {"DATALOADER.NUM_WORKERS": 0})
        with pytest.raises(DatasetError, match=r"8\.png"):
            list(TeacherTrainer.build_test_loader(cfg, "preflight_test"))


def segmented(polygons):
    return lambda a, u, t: a[1]["annotations"][0].update(segmentation=polygons)


DEFECTS = {  # (change of the labeled, unlabeled and test records, message)
    "no images": (lambda a, u, t: a.clear(), "'preflight_labeled' has no images"),
    "no records": (lambda a, u, t: a.insert(0, "a.png"), "cannot be loaded"),
    "no path": (lambda a, u, t: a[0].pop("file_name"), "cannot be loaded.*file_name"),
    "no instances": (
        lambda a, u, t: [r.update(annotations=[]) for r in a], "_labeled' has 3 images and no"),
    "class out of range": (
        lambda a, u, t: a[2]["annotations"][0].update(category_id=2), r"2\.png has the class id 2"),
    "class of another type": (
        lambda a, u, t: a[2]["annotations"][0].update(category_id=[]), r"2\.png has the class id"),
    "other size": (lambda a, u, t: a[0].update(width=31), r"0\.png .*\(20, 30\).*\(20, 31\)"),
    "damaged image": (lambda a, u, t: cut(t[1]["file_name"]), r"8\.png"),
    "missing image": (lambda a, u, t: a[1].update(file_name="none.png"), r"none\.png"),
    "damaged annotation": (segmented([[1, 2]]), r"1\.png.*polygon"),
    "no mask": (segmented(None), r"1\.png.*NoneType"),
    "mask far outside": (segmented([[9e9] * 6]), r"1\.png.*far outside"),
    "test image in training": (
        lambda a, u, t: t.append(dict(a[0])), r"0\.png .*'preflight_.*labeled'.*_test' \(test\)"),
    "test image unlabeled": (
        lambda a, u, t: t[0].update(file_name=u[5]["file_name"]), r"5\.png .*\(unlabeled\)"),
    "image twice": (lambda a, u, t: a.append(a[0]), r"0\.png .*_labeled'.*'preflight_labeled'"),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_bad_data_sets_are_named(sets, defect):
    change, message = DEFECTS[defect]
    change(*sets.values())
    with pytest.raises(DatasetError, match=message):
        check_datasets(config())


def test_unreadable_unlabeled_images_are_trainings_business_unless_all_are(sets):
    """And none of stage 1."""
    for number, item in enumerate(sets["preflight_unlabeled"]):
        item["file_name"] = f"none{number}.png"
        found = lines()["unlabeled data"]
        assert found.status == ("error" if number == 5 else "warning")
        assert "none0.png" in str(found.errors or found.warnings)
    assert "unlabeled data" not in lines({"S4M.STAGE": "teacher"})


def test_images_outside_of_the_sample_are_told_before(sets, tmp_path):
    records = [record(tmp_path, number) for number in range(40)]
    for start, role in ((50, "labeled"), (100, "test")):
        of_role = sets[f"preflight_{role}"][:] = [record(tmp_path, start + n) for n in range(20)]
        for turned in of_role[1:3]:
            turned.update(height=WIDTH, width=HEIGHT)
        cut(of_role[4]["file_name"])
        damaged, other_size = sorted(map(str, lines()[f"{role} data"].errors), key=len)
        assert "annotated without the rotation" in other_size and "(1 more" in other_size
        assert f"{start + 4}.png" in damaged
    (tmp_path / "24.png").write_bytes(b"no image")
    Image.fromarray(np.full((HEIGHT, WIDTH), 999, dtype=np.uint16)).save(tmp_path / "26.png")
    paths = [item["file_name"] for item in records]
    unlabeled = sets["preflight_unlabeled"][:] = unlabeled_records(paths, str(tmp_path))
    with pytest.raises(DatasetError) as refused:
        ARPDatasetMapper(config())(unlabeled[24])
    warnings = lines()["unlabeled data"].warnings
    assert str(refused.value) in str(warnings) and "26.png has gray values" in str(warnings)
    changes = {"S4M.MAX_SKIPPED_IMAGES": 1}  # such a run would stop in stage 2
    assert "MAX_SKIPPED_IMAGES" in str(lines(changes)["unlabeled data"].errors)


def test_wrong_numbers_of_classes_unknown_sets_and_broken_loaders_are_named(sets):
    with pytest.raises(ConfigError, match="NUM_CLASSES is 3.*preflight_labeled"):
        check_datasets(config({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3}))
    with pytest.raises(DatasetError, match="'fruit'.*preflight_labeled"):
        check_datasets(config({"DATASETS.TRAIN": ("fruit",)}))
    DatasetCatalog.remove("preflight_labeled")
    DatasetCatalog.register("preflight_labeled", lambda: 1 / 0)
    with pytest.raises(DatasetError, match="'preflight_labeled' cannot be loaded.*by zero"):
        check_datasets(config())


def test_many_images_without_instances_are_a_warning(sets, tmp_path):
    sets["preflight_labeled"] += [record(tmp_path, n, ()) for n in range(10, 13)]
    assert lines()["labeled data"].status == "ok"
    sets["preflight_labeled"].append(record(tmp_path, 13, ()))
    assert "4 of the 7 images" in lines()["labeled data"].warnings[0]


def test_a_class_that_the_labeled_images_lack_is_a_warning(sets, tmp_path):
    sets["preflight_labeled"][:] = [record(tmp_path, 0, (0, 0))]
    found = lines()
    assert found["labeled data"].status == "ok"
    assert found["labeled classes"].text == "person 2, car 0"
    assert "no instance of car" in found["labeled classes"].warnings[0]
    assert found["test classes"].status == "ok"  # of the test set: car 0 is no problem
