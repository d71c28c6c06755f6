import copy
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from data_scenes import GREEN, HEIGHT, PERSON, RED, WIDTH, scene
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from test_transforms import config

from s4m_d2.data import (
    DATASET_MAPPER_REGISTRY,
    ARPDatasetMapper,
    LabeledDatasetMapper,
    TrueLabelsMapper,
)
from s4m_d2.data.segmentations import transform_masks
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.structures import mask_boxes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BLENDED = 3  # px along a figure's border whose colors are mixed, at the largest scale
SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]


def record_of(name, position=0):
    record = DatasetCatalog.get(name)[0]
    return {**record, "seeds": sample_seeds(7, "labeled", position), "stream_position": position}


def labeled_mapper(keep_empty=False, **inputs):
    cfg = config(FORMAT="RGB", **inputs)
    cfg.S4M.KEEP_EMPTY_INSTANCES = keep_empty
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8
    return DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, True)


def arp_mapper(**inputs):
    return DATASET_MAPPER_REGISTRY.get("ARPDatasetMapper")(config(FORMAT="RGB", **inputs), True)


def near(image, color):
    """(H, W) bool: where a (3, H, W) image shows a color, away from blended borders."""
    difference = image.int() - torch.tensor(color)[:, None, None]
    return (difference.abs() <= 30).all(0)


def grown(mask, pixels):
    """A mask whose border moves outward, or inward where ``pixels`` is negative."""
    kernel = np.ones((2 * abs(pixels) + 1,) * 2)
    change = cv2.dilate if pixels > 0 else cv2.erode
    outside = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    return torch.from_numpy(change(mask.numpy().astype(np.uint8), kernel, **outside)).bool()


@pytest.mark.parametrize("name", ["mask_former_instance", "coco_instance_lsj"])
def test_masks_move_with_the_image(data_root, name):
    mapper = labeled_mapper(DATASET_MAPPER_NAME=name, IMAGE_SIZE=64, MIN_SCALE=0.8)
    seen = set()
    for position in range(30):
        sample = mapper(record_of("toyscapes_train", position))
        instances = sample["instances"]
        assert instances.image_size == tuple(sample["image"].shape[1:])
        assert torch.equal(instances.gt_boxes.tensor, mask_boxes(instances.gt_masks.tensor))
        for mask, class_id in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True):
            shows = near(sample["image"], {0: RED, 2: GREEN}[int(class_id)])
            assert shows[grown(mask, -BLENDED)].all()
            assert not shows[~grown(mask, BLENDED)].any()
            seen.add(int(class_id))
    assert seen == {0, 2}


def test_instances_outside_the_crop_go_or_stay_with_an_empty_mask(data_root):
    outside = 0
    for position in range(10):
        record = record_of("toyscapes_train", position)
        seen, every = (labeled_mapper(keep)(record)["instances"] for keep in (False, True))
        assert every.gt_classes.tolist() == [0, 2]
        shown = every.gt_masks.tensor.flatten(1).any(1)
        assert seen.gt_classes.tolist() == every.gt_classes[shown].tolist()
        assert torch.equal(seen.gt_masks.tensor, every.gt_masks.tensor[shown])
        assert not every.gt_boxes.tensor[~shown].any()
        outside += int((~shown).sum())
    assert outside


def test_a_tile_is_what_its_image_has_there(data_root):
    """Of the scene: a part of the person, nothing of the car."""
    record = {**record_of("toyscapes_train"), "tile": (2, 1, 11, 17)}
    image, ids = scene(int(Path(record["file_name"]).name.split("_")[1]))
    shown = image[1:17, 2:11].transpose(2, 0, 1)
    plain = {"geometry": [], "image_format": "RGB"}
    sample = LabeledDatasetMapper(**plain, color=None, num_classes=8)(record)
    assert np.array_equal(sample["image"], shown)
    (mask,) = sample["instances"].gt_masks.tensor
    assert np.array_equal(mask, ids[1:17, 2:11] == PERSON)
    unlabeled = ARPDatasetMapper(**plain, color=None)(record)
    assert np.array_equal(unlabeled["image"], shown)
    known = TrueLabelsMapper(**plain, num_classes=8)(record)
    assert np.array_equal(known["image"], shown) and len(known["truth"]) == 1
    assert (known["height"], known["width"]) == (16, 9)


def test_a_sample_is_a_function_of_its_record_with_the_loader_s_keys(data_root):
    record = record_of("toyscapes_train")
    before = copy.deepcopy(record)
    sample = labeled_mapper()(record)
    assert record == before
    assert set(sample) == set(record) - {"annotations"} | {"image", "instances"}
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert sample["image"].dtype == torch.uint8 and sample["image"].is_contiguous()
    assert torch.equal(labeled_mapper()(record)["image"], sample["image"])
    others = [labeled_mapper()(record_of("toyscapes_train", p))["image"] for p in range(1, 5)]
    assert not all(torch.equal(sample["image"], other) for other in others)


@pytest.mark.parametrize(
    ("config_file", "size", "distorts"),
    [("cityscapes_10pct.yaml", (1024, 2048), True), ("coco_10pct.yaml", (480, 640), False)],
)
def test_labeled_and_weak_views_come_from_one_distribution(config_file, size, distorts, tmp_path):
    """With the same seeds they are the same view; only SSD's distortion changes the plain one."""
    cfg = load_config(str(CONFIGS / config_file))
    labeled, unlabeled = (
        DATASET_MAPPER_REGISTRY.get(name)(cfg, True)
        for name in (cfg.INPUT.DATASET_MAPPER_NAME, cfg.S4M.UNLABELED_MAPPER)
    )
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, np.full((*size, 3), (40, 120, 200), dtype=np.uint8))
    changed = 0
    for position in range(8):
        record = {"file_name": path, "seeds": sample_seeds(7, "labeled", position)}
        views = unlabeled(record)
        assert torch.equal(labeled({**record, "annotations": []})["image"], views["image_weak"])
        changed += not torch.equal(views["image"], views["image_weak"])
    assert changed >= 5 if distorts else changed == 0  # 15 of 16 on average


def test_images_without_instances(data_root):
    crowd = {"category_id": 0, "segmentation": SQUARE, "iscrowd": 1}
    rle = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    empty = {"category_id": 0, "segmentation": rle}
    for annotations in ([], [crowd], [empty]):
        record = {**record_of("toyscapes_train"), "annotations": annotations}
        instances = labeled_mapper()(record)["instances"]
        assert instances.gt_masks.tensor.shape == (0, 24, 48)
        assert instances.gt_boxes.tensor.shape == (0, 4) and len(instances) == 0


def test_bad_annotations_name_their_image(data_root):
    good = {"category_id": 1, "segmentation": SQUARE}
    for bad, message in (
        (good | {"category_id": 8}, "category_id 8"),
        (good | {"category_id": -1}, "category_id -1"),
        (good | {"segmentation": [[1, 2, 3, 4]]}, "three points"),
        (good | {"segmentation": "mask"}, "type str"),
        (good | {"segmentation": {"size": (4, 4), "counts": [16]}}, r"\(4, 4\)"),
        ({"segmentation": SQUARE}, "category_id"),
        ({"category_id": 1}, "type NoneType"),
    ):
        record = {**record_of("toyscapes_train"), "annotations": [good, bad]}
        with pytest.raises(DatasetError, match=message) as error:
            labeled_mapper()(record)
        assert record["file_name"] in str(error.value)


def test_unlabeled_records_are_no_labeled_ones_and_both_mappers_are_for_training(data_root):
    with pytest.raises(DatasetError, match="DATASETS.UNLABELED"):
        labeled_mapper()(record_of("toyscapes_train_unlabeled"))
    for mapper in (ARPDatasetMapper, LabeledDatasetMapper):
        with pytest.raises(InputError):
            mapper(config(FORMAT="RGB"), False)


def test_both_mappers_work_in_detectron2_s_own_loader(data_root):
    for mapper, name in (
        (labeled_mapper(), "toyscapes_train"),
        (arp_mapper(), "toyscapes_train_unlabeled"),
    ):
        loader = build_detection_train_loader(
            DatasetCatalog.get(name)[:1], mapper=mapper, total_batch_size=8, num_workers=1
        )
        batch = next(iter(loader))
        assert all(s["image"].shape == (3, 24, 48) and "seeds" not in s for s in batch)
        assert len({s["image"].numpy().tobytes() for s in batch}) > 1  # seeds of their own


def test_polygons_that_leave_the_view_are_cut_and_stay_in_the_record_as_they_are():
    polygon = np.array([-6.0, 12.0, 30.0, -8.0, 90.0, 20.0, 20.0, 22.0])
    before = polygon.copy()
    x, y, height, width = 10, 5, 20, 40
    transforms = T.TransformList([T.CropTransform(x, y, width, height)])
    (cut,) = transform_masks([[polygon]], transforms, (HEIGHT, WIDTH), (height, width))
    margin = 100
    canvas = mask_util.decode(mask_util.frPyObjects([polygon + margin], 300, 300))[..., 0]
    window = canvas[margin + y : margin + y + height, margin + x : margin + x + width]
    assert 0 < window.sum() < window.size
    assert np.array_equal(cut.numpy(), window.astype(bool)) and np.array_equal(polygon, before)
