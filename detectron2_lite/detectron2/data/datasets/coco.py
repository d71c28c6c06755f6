"""Data sets in COCO's instance annotation format."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
from typing import Any

import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..catalog import DatasetCatalog, MetadataCatalog

__all__ = ["load_coco_json", "register_coco_instances"]

logger = logging.getLogger(__name__)

_ANNOTATION_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")
_MIN_POLYGON_LENGTH = 6  # three points
_KEYPOINT_SHIFT = (0.5, 0.5, 0)  # x, y, visibility


def register_coco_instances(
    name: str, metadata: dict[str, Any], json_file: str | os.PathLike, image_root: str | os.PathLike
) -> None:
    """Register a COCO json file as data set ``name``; ``metadata`` is added to its metadata."""
    assert isinstance(name, str), name
    for path in (json_file, image_root):
        assert isinstance(path, (str, os.PathLike)), path
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: load_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=image_root, evaluator_type="coco", **metadata
    )


def load_coco_json(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    dataset_name: str | None = None,
    extra_annotation_keys: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Read a COCO instances file into records, in the order of the image ids.

    Args:
        dataset_name: if given, category ids become contiguous from 0 and the class names and the
            map of the ids go into this data set's metadata.
        extra_annotation_keys: further keys to take over from each annotation as they are.

    Returns:
        Records with "file_name" under ``image_root``, "height", "width", "image_id" and
        "annotations": "bbox" XYWH in pixels, "category_id", "iscrowd" and, where there is one,
        "segmentation" (polygons, or a compressed RLE). Instances without any valid polygon are
        dropped with a warning.

    Raises:
        AssertionError: annotation ids that repeat, annotations marked "ignore".
        KeyError: a category id that the file does not define.
        ValueError: an empty box.
    """
    json_file = PathManager.get_local_path(os.fspath(json_file))
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO(json_file)
    id_map = None if dataset_name is None else _map_category_ids(api, dataset_name)
    image_ids = sorted(api.imgs)
    annotations = [api.imgToAnns[i] for i in image_ids]
    _check_annotations(api, annotations, json_file)
    logger.info(f"Loaded {len(image_ids)} images in COCO format from {json_file}")

    keys = (*_ANNOTATION_KEYS, *(extra_annotation_keys or ()))
    records = []
    num_dropped = 0
    for image_id, annos in zip(image_ids, annotations, strict=True):
        image = api.imgs[image_id]
        objects = [_convert_annotation(a, image_id, keys, id_map) for a in annos]
        kept = [o for o in objects if o is not None]
        num_dropped += len(objects) - len(kept)
        records.append(
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": image_id,
                "annotations": kept,
            }
        )
    if num_dropped:
        logger.warning(
            f"Filtered out {num_dropped} instances without valid segmentation. "
            f"Please check how {json_file} was made."
        )
    return records


def _map_category_ids(api: COCO, dataset_name: str) -> dict[int, int]:
    """Contiguous ids in the order of the file's ids; also stored in the metadata."""
    ids = sorted(api.getCatIds())
    meta = MetadataCatalog.get(dataset_name)
    meta.thing_classes = [c["name"] for c in api.loadCats(ids)]
    if ids != list(range(1, len(ids) + 1)) and "coco" not in dataset_name:
        logger.warning(
            "Category ids in annotations are not in [1, #categories]! They are mapped to "
            "contiguous ones."
        )
    id_map = {category_id: i for i, category_id in enumerate(ids)}
    meta.thing_dataset_id_to_contiguous_id = id_map
    return id_map


def _check_annotations(api: COCO, annotations: list[list[dict]], json_file: str) -> None:
    ids = [a["id"] for per_image in annotations for a in per_image]
    if len(ids) < len(api.anns):
        logger.warning(
            f"{json_file} contains {len(api.anns)} annotations, but only {len(ids)} of them "
            "match to images in the file."
        )
    if "minival" not in json_file:  # COCO 2014's minival files are known to repeat a few ids
        assert len(set(ids)) == len(ids), f"Annotation ids in '{json_file}' are not unique!"


def _convert_annotation(
    anno: dict[str, Any], image_id: int, keys: tuple[str, ...], id_map: dict[int, int] | None
) -> dict[str, Any] | None:
    """One annotation as an object of a record; None if no polygon of it is valid."""
    assert anno["image_id"] == image_id, (anno["image_id"], image_id)
    assert anno.get("ignore", 0) == 0, '"ignore" in COCO json file is not supported.'
    obj = {key: anno[key] for key in keys if key in anno}
    if "bbox" in obj and len(obj["bbox"]) == 0:
        raise ValueError(
            f"One annotation of image {image_id} contains empty 'bbox' value! "
            "This json does not have valid COCO format."
        )
    segm = anno.get("segmentation")
    if isinstance(segm, dict) and segm:
        if isinstance(segm["counts"], list):
            segm = mask_util.frPyObjects(segm, *segm["size"])
        obj["segmentation"] = segm
    elif segm:
        valid = [p for p in segm if len(p) % 2 == 0 and len(p) >= _MIN_POLYGON_LENGTH]
        if not valid:
            return None
        obj["segmentation"] = valid
    if obj.get("keypoints"):  # pixel indices to continuous coordinates
        shift = itertools.cycle(_KEYPOINT_SHIFT)
        obj["keypoints"] = [value + next(shift) for value in obj["keypoints"]]
    obj["bbox_mode"] = BoxMode.XYWH_ABS
    if id_map:
        if obj["category_id"] not in id_map:
            raise KeyError(
                f"Encountered category_id={obj['category_id']} but this id does not exist in "
                "'categories' of the json file."
            )
        obj["category_id"] = id_map[obj["category_id"]]
    return obj
