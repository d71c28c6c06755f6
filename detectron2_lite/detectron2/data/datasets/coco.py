"""Data sets in COCO's instance annotation format."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from ..catalog import DatasetCatalog, MetadataCatalog

logger = logging.getLogger(__name__)

_ANNOTATION_KEYS = ("iscrowd", "bbox", "category_id")
_MIN_POLYGON_LENGTH = 6  # three points


def register_coco_instances(
    name: str, metadata: dict[str, Any], json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Register a COCO json file as data set ``name``, with further ``metadata``."""
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def load_coco_json(
    json_file: str | os.PathLike, image_root: str | os.PathLike, dataset_name: str | None = None
) -> list[dict[str, Any]]:
    """Read a COCO instances file into records, in the order of the image ids.

    dataset_name: if given, category ids become contiguous from 0, and the class names and the map
    of the ids go into its metadata.

    Boxes stay XYWH in pixels; segmentations are polygons or compressed RLEs. Instances without any
    valid polygon are left out. Raises AssertionError for annotation ids that repeat or annotations
    marked "ignore", KeyError for an undefined category, ValueError for an empty box.
    """
    json_file = PathManager.get_local_path(os.fspath(json_file))
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(json_file)
    id_map = None if dataset_name is None else _map_category_ids(api, dataset_name)
    _check_annotation_ids(api, json_file)
    records = []
    num_dropped = 0
    for image_id, image in sorted(api.imgs.items()):
        objects = [_convert(a, id_map) for a in api.imgToAnns[image_id]]
        num_dropped += objects.count(None)
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": [o for o in objects if o is not None],
            }
        )
    logger.info(f"Loaded {len(records)} images in COCO format from {json_file}")
    if num_dropped:
        logger.warning(f"Left out {num_dropped} instances of {json_file} without valid polygons.")
    return records


def _map_category_ids(api: COCO, dataset_name: str) -> dict[int, int]:
    """Contiguous ids in the order of the file's ids; also stored in the metadata."""
    ids = sorted(api.getCatIds())
    id_map = {category_id: i for i, category_id in enumerate(ids)}
    if ids != list(range(1, len(ids) + 1)) and "coco" not in dataset_name:
        logger.warning("Category ids are not in [1, #categories]! They are mapped to [0, #-1].")
    MetadataCatalog.get(dataset_name).set(
        thing_classes=[c["name"] for c in api.loadCats(ids)],
        thing_dataset_id_to_contiguous_id=id_map,
    )
    return id_map


def _check_annotation_ids(api: COCO, json_file: str) -> None:
    ids = [a["id"] for image_id in api.imgs for a in api.imgToAnns[image_id]]
    if len(ids) < len(api.anns):
        logger.warning(f"{len(api.anns) - len(ids)} annotations of {json_file} belong to no image.")
    assert len(set(ids)) == len(ids), f"Annotation ids in '{json_file}' are not unique!"


def _convert(anno: dict[str, Any], id_map: dict[int, int] | None) -> dict[str, Any] | None:
    """One annotation as an object of a record; None if no polygon of it is valid."""
    where = f"annotation {anno['id']} of image {anno['image_id']}"
    assert anno.get("ignore", 0) == 0, f'"ignore" is not supported: {where}'
    obj = {key: anno[key] for key in _ANNOTATION_KEYS if key in anno}
    if "bbox" in obj and len(obj["bbox"]) == 0:
        raise ValueError(f"Empty 'bbox': {where}")
    if segm := anno.get("segmentation"):
        if isinstance(segm, list):
            segm = [p for p in segm if len(p) % 2 == 0 and len(p) >= _MIN_POLYGON_LENGTH]
            if not segm:
                return None
        elif isinstance(segm["counts"], list):
            segm = mask_util.frPyObjects(segm, *segm["size"])
        obj["segmentation"] = segm
    obj["bbox_mode"] = BoxMode.XYWH_ABS
    if id_map:
        if obj["category_id"] not in id_map:
            raise KeyError(f"'categories' has no category_id={obj['category_id']}: {where}")
        obj["category_id"] = id_map[obj["category_id"]]
    return obj
