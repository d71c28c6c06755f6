"""Cityscapes' fine instance annotations, from the polygons or from the instance-id images."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from itertools import chain
from typing import Any

import cv2
import numpy as np
from cityscapesscripts.helpers.labels import Label, id2label, labels, name2label
from detectron2.structures import BoxMode
from detectron2.utils.comm import get_world_size
from detectron2.utils.file_io import PathManager
from PIL import Image
from shapely.geometry import MultiPolygon, Polygon

logger = logging.getLogger(__name__)

_IMAGE_SUFFIX = "leftImg8bit.png"
_INSTANCE_SUFFIX = "gtFine_instanceIds.png"
_POLYGON_SUFFIX = "gtFine_polygons.json"
_GROUP_SUFFIX = "group"  # a crowd, such as "cargroup"
_FIRST_THING_ID = 24
_IDS_PER_LABEL = 1000  # instance id = label id * 1000 + number; without a number: a crowd
_FILES_PER_PROCESS = 200
_HALF_PIXEL = 0.5
_DILATION_SEGMENTS = 4  # straight segments of a quarter circle
_MIN_CONTOUR_POINTS = 3


def load_cityscapes_instances(
    image_dir: str, gt_dir: str, from_json: bool = True
) -> list[dict[str, Any]]:
    """Read the records of a split (``leftImg8bit/train`` and ``gtFine/train``), ordered by city.

    ``from_json`` reads ``*_polygons.json``, else ``*_instanceIds.png``. Segmentations are polygons,
    "category_id" is in [0, 8), "bbox" XYXY in pixels.
    """
    files = _list_files(image_dir, gt_dir)
    read = functools.partial(_read_record, from_json=from_json)
    cpus = max((os.cpu_count() or 1) // get_world_size(), 1)
    with multiprocessing.Pool(min(cpus, 1 + len(files) // _FILES_PER_PROCESS)) as pool:
        records = pool.map(read, files)
    logger.info(f"Loaded {len(records)} images from {image_dir}")

    contiguous = {label.id: i for i, label in enumerate(x for x in labels if _is_thing(x))}
    for anno in chain.from_iterable(r["annotations"] for r in records):
        anno["category_id"] = contiguous[anno["category_id"]]
    return records


def _is_thing(label: Label) -> bool:
    return label.hasInstances and not label.ignoreInEval


def _list_files(image_dir: str, gt_dir: str) -> list[tuple[str, str, str]]:
    """(image, instance ids, polygons) of every image."""
    files = []
    for city in sorted(PathManager.ls(image_dir)):
        for name in sorted(PathManager.ls(os.path.join(image_dir, city))):
            assert name.endswith(_IMAGE_SUFFIX), f"Not a Cityscapes image: {city}/{name}"
            stem = os.path.join(gt_dir, city, name[: -len(_IMAGE_SUFFIX)])
            image = os.path.join(image_dir, city, name)
            files.append((image, stem + _INSTANCE_SUFFIX, stem + _POLYGON_SUFFIX))
    assert files, f"No images found in {image_dir}"
    for path in files[0]:
        assert PathManager.isfile(path), f"Missing file: {path}"
    return files


def _read_record(files: tuple[str, str, str], from_json: bool) -> dict[str, Any]:
    """One image's record, with Cityscapes' own label ids as category ids."""
    image_file, instance_file, polygon_file = files
    if from_json:
        with PathManager.open(polygon_file, "r") as f:
            content = json.load(f)
        height, width = content["imgHeight"], content["imgWidth"]
        annotations = _from_polygons(content["objects"])
    else:
        with PathManager.open(instance_file, "rb") as f:
            instance_ids = np.asarray(Image.open(f))
        height, width = instance_ids.shape
        annotations = _from_instance_ids(instance_ids)
    return {
        "file_name": image_file,
        "image_id": os.path.basename(image_file),
        "height": height,
        "width": width,
        "annotations": [{**a, "bbox_mode": BoxMode.XYXY_ABS} for a in annotations],
    }


def _from_polygons(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Annotations without overlaps, from the last object to the first.

    Later objects lie over earlier ones, so going backward each keeps what is not yet covered.
    Cityscapes' tools draw a polygon's border pixels as part of it: the integer coordinates are
    pixel centers, and the shape is half a pixel wider than the polygon.
    """
    covered = Polygon()
    for obj in reversed(objects):
        name = obj["label"]
        is_crowd = name.endswith(_GROUP_SUFFIX) and name not in name2label
        label = name2label[name.removesuffix(_GROUP_SUFFIX) if is_crowd else name]
        if "deleted" in obj or label.id < 0:
            continue
        corners = np.asarray(obj["polygon"], dtype="f4") + _HALF_PIXEL
        shape = Polygon(corners).buffer(_HALF_PIXEL, quad_segs=_DILATION_SEGMENTS)
        visible = shape.difference(covered) if _is_thing(label) else shape
        if visible.is_empty:
            continue
        covered = covered.union(shape)
        if not _is_thing(label):
            continue
        parts = visible.geoms if isinstance(visible, MultiPolygon) else [visible]
        yield {
            "iscrowd": is_crowd,
            "category_id": label.id,
            # Only outlines: a COCO polygon cannot have holes.
            "segmentation": [list(chain(*part.exterior.coords)) for part in parts],
            "bbox": visible.bounds,
        }


def _from_instance_ids(instance_ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """Annotations from an (H, W) image of instance ids, in the order of the ids."""
    for instance_id in np.unique(instance_ids[instance_ids >= _FIRST_THING_ID]).tolist():
        is_crowd = instance_id < _IDS_PER_LABEL
        label = id2label[instance_id if is_crowd else instance_id // _IDS_PER_LABEL]
        if not _is_thing(label):
            continue
        mask = (instance_ids == instance_id).astype(np.uint8)
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max(), ys.max())
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[-2]
        contours = [c for c in contours if len(c) >= _MIN_CONTOUR_POINTS]
        if not contours:
            continue
        yield {
            "iscrowd": is_crowd,
            "category_id": label.id,
            "bbox": tuple(int(x) for x in box),
            "segmentation": [c.reshape(-1).tolist() for c in contours],
        }
