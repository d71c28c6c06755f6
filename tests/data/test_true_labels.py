"""Where the labels of unlabeled images are, which images are measured, and in which frame."""

import json
import os

import numpy as np
import pytest
import torch
from data_scenes import HEIGHT, WIDTH, coco_content, scene
from detectron2.data import DatasetCatalog
from test_transforms import config

from s4m_d2.data import (
    CocoFormat,
    TrueLabelsMapper,
    register_splits,
    register_unlabeled_folder,
    true_records,
)
from s4m_d2.data.splits import has_true_labels
from s4m_d2.errors import DatasetError

UNLABELED = "toyscapes_train_unlabeled"
PERSON_CLASS, CAR_CLASS = 0, 2  # contiguous


def mapper(side=HEIGHT, classes=8, image_format="RGB"):
    cfg = config(MIN_SIZE_TEST=side, FORMAT=image_format)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = classes
    return TrueLabelsMapper(cfg)


def files(records):
    return [record["file_name"] for record in records]


def test_records_are_those_of_the_labeled_set_in_an_order_that_begins_alike(data_root):
    labeled = {record["file_name"]: record for record in DatasetCatalog.get("toyscapes_train")}
    records = true_records([UNLABELED])
    assert len(records) == 20 and all(record == labeled[record["file_name"]] for record in records)
    whole = files(records)
    assert files(true_records([UNLABELED], 7)) == whole[:7]
    assert files(true_records([UNLABELED], 100)) == whole
    assert {os.path.basename(os.path.dirname(path)) for path in whole[:7]} == {"alpha", "beta"}
    both = true_records([UNLABELED, "toyscapes_val"], 10)
    everything = true_records(["toyscapes_val", UNLABELED])
    assert files(both) == files(everything)[:10] and len(everything) == 23


def test_only_annotations_of_the_chosen_images_are_read(data_root):
    chosen = [os.path.basename(path) for path in files(true_records([UNLABELED], 4))]
    for path in (data_root / "toyscapes/gtFine/train").rglob("*.png"):
        if path.name.replace("gtFine_instanceIds", "leftImg8bit") not in chosen:
            path.unlink()
    assert len(true_records([UNLABELED], 4)) == 4
    with pytest.raises(DatasetError, match="gtFine"):
        true_records([UNLABELED], 5)


def test_images_that_training_has_labels_of_are_left_out(data_root):
    known = files(DatasetCatalog.get("toyscapes_train_30pct"))
    left = files(true_records([UNLABELED], 0, known))
    assert len(known) == 6 and len(left) == 14 and not set(known) & set(left)
    assert len(true_records([UNLABELED], 14, known)) == 14
    everything = files(DatasetCatalog.get(UNLABELED))
    with pytest.raises(DatasetError, match="S4M.QUALITY.DATASETS"):
        true_records([UNLABELED], 0, everything)


def test_sets_of_register_splits_have_labels_and_folders_none(data_root, name):
    register_unlabeled_folder(name, str(data_root / "toyscapes/leftImg8bit"))
    register_splits(f"{name}_made", CocoFormat("a.json", "images"), ())
    assert not has_true_labels(name)
    assert has_true_labels(UNLABELED) and has_true_labels(f"{name}_made_unlabeled")
    with pytest.raises(DatasetError, match=f"{name}.*S4M.QUALITY.DATASETS"):
        true_records([name])


def test_coco_labels_with_polygons_run_lengths_and_a_crowd(coco_root, name):
    content = coco_content(10)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["category_id"] == 7)
    (coco_root / "instances.json").write_text(json.dumps(content))
    dataset = CocoFormat(str(coco_root / "instances.json"), str(coco_root / "images"))
    register_splits(name, dataset, (50,), full=True)
    known = files(DatasetCatalog.get(f"{name}_50pct"))
    records = true_records([f"{name}_unlabeled"], 0, known)
    assert len(records) == 5 and not set(files(records)) & set(known)
    truth = mapper(classes=2)(records[0])["truth"]
    assert truth.gt_classes.tolist() == [0, 1] and truth.gt_crowds.tolist() == [False, True]
    assert truth.gt_masks.tensor.sum((1, 2)).tolist() == [16 * 16, 5 * HEIGHT]
    with pytest.raises(DatasetError, match="no image is left"):
        true_records([f"{name}_unlabeled"], 0, [*known, *files(records)])


@pytest.mark.parametrize("scale", [1, 2])
def test_the_truth_is_in_the_frame_of_the_resized_image(data_root, scale):
    record = true_records([UNLABELED], 1)[0]
    sample = mapper(side=scale * HEIGHT)(record)
    image, ids = scene(int(os.path.basename(record["file_name"]).split("_")[1]))
    truth = sample["truth"]
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert sample["image"].shape == (3, scale * HEIGHT, scale * WIDTH)
    assert sample["image"].dtype == torch.uint8
    assert truth.image_size == tuple(sample["image"].shape[-2:])
    assert truth.gt_classes.tolist() == [CAR_CLASS, PERSON_CLASS, CAR_CLASS]
    assert truth.gt_crowds.tolist() == [True, False, False]
    larger = np.kron(ids, np.ones((scale, scale), dtype=int))
    for mask, value in zip(truth.gt_masks.tensor, (26, 24001, 26002), strict=True):
        assert np.array_equal(mask.numpy(), larger == value)
    crowd = {"iscrowd": 1, "category_id": 0, "segmentation": []}
    for annotations in ([], [crowd]):
        empty = mapper()({**record, "annotations": annotations})["truth"]
        assert len(empty) == 0 and empty.gt_masks.tensor.shape == (0, HEIGHT, WIDTH)
    if scale == 1:
        assert np.array_equal(sample["image"].numpy(), image.transpose(2, 0, 1))
        flipped = mapper(image_format="BGR")(record)["image"]
        assert torch.equal(flipped, sample["image"].flip(0))
