"""Records of data sets and what the mapper makes of them, against Detectron2's."""

import itertools
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.structures import BoxMode
from PIL import Image
from test_data_datasets import _write_cityscapes, cityscapes_tools  # noqa: F401

HEIGHT, WIDTH = 40, 56


def blob(random, points):
    """A star-shaped polygon inside of the image: [x0, y0, x1, y1, …]."""
    center = random.uniform([12, 10], [WIDTH - 12, HEIGHT - 10])
    angles = np.sort(random.uniform(0, 2 * np.pi, points))
    around = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    polygon = center + random.uniform(3, 10, (points, 1)) * around
    return np.round(polygon, 1).ravel().tolist()


def annotation(random, index):
    segmentation = [blob(random, 7) for _ in range(1 + index % 2)]
    xy = np.concatenate(segmentation).reshape(-1, 2)
    box = [*xy.min(0), *(xy.max(0) - xy.min(0))]
    return {
        "bbox": [float(x) for x in box], "bbox_mode": BoxMode.XYWH_ABS, "category_id": index % 3,
        "iscrowd": int(index == 2), "segmentation": segmentation, "keypoints": [1.0, 2.0, 2],
    }  # fmt: skip


@pytest.fixture
def record(tmp_path):
    random = np.random.RandomState(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [100 + 90 * np.sin(0.1 * (c + 1) * x + 0.07 * y + c) for c in range(3)]
    Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).save(tmp_path / "image.png")
    return {
        "file_name": str(tmp_path / "image.png"), "height": HEIGHT, "width": WIDTH, "image_id": 1,
        "annotations": [annotation(random, i) for i in range(6)],
    }  # fmt: skip


MAPPERS = {
    "default": {},
    "range": {"INPUT.MIN_SIZE_TRAIN": (30, 70), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
    "crop": {"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [0.4, 0.5]},
    "small_crop": {
        "INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [16, 18],
        "INPUT.RANDOM_FLIP": "vertical", "INPUT.FORMAT": "RGB",
    },
    "no_masks": {"MODEL.MASK_ON": False, "INPUT.RANDOM_FLIP": "none"},
    "gray": {"INPUT.FORMAT": "L"},
}  # fmt: skip


def mapper_cfg(options):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (24, 40, 60), 70
    cfg.INPUT.MIN_SIZE_TEST = 33
    cfg.merge_from_list(list(itertools.chain(*options.items())))
    return cfg


def summary(sample):
    image = sample["image"].double()
    result = {
        "shape": list(image.shape),
        "rows": image.mean((0, 2))[::5],
        "columns": image.mean((0, 1))[::5],
        "keys": sorted(sample),
    }
    if "instances" in sample:
        fields = sample["instances"].get_fields()
        result |= {
            "fields": sorted(fields),
            "boxes": fields["gt_boxes"].tensor,
            "classes": fields["gt_classes"],
        }
        if "gt_masks" in fields:
            result["mask_boxes"] = fields["gt_masks"].get_bounding_boxes().tensor
            masks = fields["gt_masks"]
            polygons = getattr(masks, "polygons", None)
            result["masks"] = polygons or masks.tensor.flatten(1).sum(1)
    return result


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("name", MAPPERS)
def test_training_samples(reference, record, name, mask_format):
    cfg = mapper_cfg({**MAPPERS[name], "INPUT.MASK_FORMAT": mask_format})
    mapper = DatasetMapper(cfg, is_train=True)
    np.random.seed(1)
    samples = [summary(mapper(record)) for _ in range(2 if mask_format == "polygon" else 4)]
    # Pixels may be off by one level where Pillow rounds otherwise
    numbers = [[s.pop("rows"), s.pop("columns")] for s in samples]
    reference(f"mapper/pixels/{name}/{mask_format}", numbers, abs=0.5)
    reference(f"mapper/{name}/{mask_format}", samples, rel=1e-5, abs=1e-4)


def test_test_samples(reference, record):
    sample = summary(DatasetMapper(mapper_cfg({}), is_train=False)(record))
    reference("mapper/test", sample, abs=0.5)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "CMYK"])
@pytest.mark.parametrize("image_format", [None, "RGB", "BGR", "L"])
def test_read_images(reference, tmp_path, mode, image_format):
    ramp = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    image = Image.fromarray(ramp.astype(np.uint16) * 100 if mode == "I;16" else ramp)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    (image if mode == "I;16" else image.convert(mode)).save(path)
    array = utils.read_image(str(path), image_format)
    value = [list(array.shape), str(array.dtype), array.astype(int).sum((0, 1))]
    reference(f"read_image/{mode}/{image_format}", value, abs=24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images(reference, tmp_path, orientation):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    reference(f"read_image/exif/{orientation}", utils.read_image(str(tmp_path / "image.png"), "L"))


def test_coco_records(reference, tmp_path, record):
    random = np.random.RandomState(4)
    objects = []
    for i in range(9):
        a = annotation(random, i)
        if i % 3 == 2:
            mask = np.asfortranarray(random.rand(HEIGHT, WIDTH) < 0.5, dtype=np.uint8)
            ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=2)).tolist()
            counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            a["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
        del a["bbox_mode"], a["keypoints"]
        box, rest = a["bbox"], {"image_id": 30 - 10 * (i % 3), "category_id": [4, 90, 7][i % 3]}
        objects.append({**a, **rest, "id": 100 - i, "area": box[2] * box[3]})
    content = {
        "images": [
            {"id": i, "file_name": f"sub/{i}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in (30, 10, 20, 5)
        ],
        "annotations": objects,
        "categories": [{"id": i, "name": f"class {i}"} for i in (90, 4, 7, 5)],
    }
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    name = "reference_coco"
    records = load_coco_json(str(path), "root", name)
    metadata = MetadataCatalog.get(name).as_dict()
    MetadataCatalog.remove(name)
    for a in itertools.chain.from_iterable(r["annotations"] for r in records):
        if isinstance(a["segmentation"], dict):
            a["segmentation"] = mask_util.area(a["segmentation"])
    reference("datasets/coco", [records, metadata])


def test_cityscapes_records(reference, tmp_path, cityscapes_tools):  # noqa: F811
    random = np.random.RandomState(6)
    labels = ["car", "person", "road", "bicyclegroup", "rider", "sky", "caravan", "bus", "train"]
    objects, ids = [], np.zeros((20, 40), np.uint16)
    for i in range(14):
        x0, y0 = random.randint(0, 30), random.randint(0, 14)
        corners = [
            [x0, y0],
            [x0 + 9, y0 + random.randint(0, 4)],
            [x0 + random.randint(0, 9), y0 + 5],
        ]
        objects.append({"label": labels[i % len(labels)], "polygon": corners})
        ids[y0 : y0 + 5, x0 : x0 + 8] = [26000, 24001, 7, 33, 25004, 23, 29001, 28000][i % 8]
    folders = _write_cityscapes(tmp_path, objects, ids)
    for from_json in (True, False):
        records = sorted(
            load_cityscapes_instances(*folders, from_json), key=lambda r: r["image_id"]
        )
        annotations = [
            [int(a["iscrowd"]), a["category_id"], list(map(float, a["bbox"])),
             [list(map(float, part)) for part in a["segmentation"]]]
            for a in records[0]["annotations"]
        ]  # fmt: skip
        keys = sorted(records[0]), sorted(records[0]["annotations"][0])
        reference(f"datasets/cityscapes/{from_json}", [keys, annotations], rel=1e-6, abs=1e-6)


def test_builtin_metadata(reference):
    kept = ("thing_classes", "thing_dataset_id_to_contiguous_id", "thing_colors", "evaluator_type",
            "stuff_classes", "json_file", "image_root", "image_dir", "gt_dir")  # fmt: skip
    names = ["coco_2017_train", "coco_2017_val"]
    names += [f"cityscapes_fine_instance_seg_{split}" for split in ("train", "val")]
    for name in names:
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        values = {k: metadata.get(k) for k in kept if k != "stuff_classes" or "city" in name}
        reference(f"datasets/builtin/{name}", values)


def test_merged_mask_tensor_types(record):
    """Masks of either format keep the types that models expect."""
    for mask_format, kind in [("polygon", "PolygonMasks"), ("bitmask", "BitMasks")]:
        cfg = mapper_cfg({"INPUT.MASK_FORMAT": mask_format})
        instances = DatasetMapper(cfg, is_train=True)(record)["instances"]
        assert type(instances.gt_masks).__name__ == kind
        assert instances.gt_classes.dtype == torch.int64
        assert instances.gt_boxes.tensor.dtype == torch.float32
