"""What a checked COCO file says about its images, and a part of it to evaluate on."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pycocotools import mask as mask_utils

from s4m_d2.data.coco_checks import check_chosen
from s4m_d2.data.segmentations import compressed_rle, read_polygons

_FEWEST_NUMBERS = 6  # of a polygon: three points


def class_names(content: dict) -> list[str]:
    """Names of the classes in the order of their ids, as Detectron2's loader numbers them."""
    return [row["name"] for row in sorted(content["categories"], key=lambda row: row["id"])]


def classes_of_images(content: dict) -> dict[str, list[str]]:
    """The class of each instance, crowds left out, by the file name of its image."""
    names = {row["id"]: row["name"] for row in content["categories"]}
    files = {row["id"]: row["file_name"] for row in content["images"]}
    classes: dict[str, list[str]] = {name: [] for name in files.values()}
    for row in content["annotations"]:
        if not row.get("iscrowd", 0):
            classes[files[row["image_id"]]].append(names[row["category_id"]])
    return classes


def instance_shares(content: dict) -> Iterator[float]:
    """Each instance's share of its image's area, crowds left out; the box's without "area"."""
    areas = {row["id"]: row["height"] * row["width"] for row in content["images"]}
    for row in content["annotations"]:
        if row.get("iscrowd", 0):
            continue
        area = row["bbox"][2] * row["bbox"][3]
        if _is_area(row.get("area")):
            area = row["area"]
        yield min(max(area / areas[row["image_id"]], 0.0), 1.0)


def subset_of(content: dict, file_names: Collection[str]) -> dict:
    """The same categories with some images and their annotations."""
    wanted = set(file_names)
    images = [row for row in content["images"] if row["file_name"] in wanted]
    ids = {row["id"] for row in images}
    annotations = [row for row in content["annotations"] if row["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


def to_evaluate(content: dict, json_file: str, image_root: str) -> dict:
    """The same with all that COCO's evaluation reads: areas, crowd flags, masks it can decode.

    Tools leave out "area" and "iscrowd", and write polygons of two points, which COCO's API takes
    for boxes: these go, as in training, and so do annotations without any mask. Annotations are
    numbered anew, from 1: COCO's evaluation counts one with the id 0 as never found.

    Args:
        content: of a checked file, or :func:`subset_of` it.
        json_file, image_root: what to call the file in errors, and the folder of its images.

    Raises:
        DatasetError: a file name leads out of ``image_root``, or a segmentation is malformed or of
            another size than its image.
    """
    check_chosen(content["images"], content["annotations"], json_file, image_root)
    sizes = {row["id"]: (int(row["height"]), int(row["width"])) for row in content["images"]}
    annotations: list[dict] = []
    for row in content["annotations"]:
        size = sizes[row["image_id"]]
        segmentation = _decodable(row["segmentation"], size)
        if not segmentation:
            continue
        area = row["area"] if _is_area(row.get("area")) else _area(segmentation, size)
        crowd = int(bool(row.get("iscrowd", 0)))
        number = len(annotations) + 1
        changed = {"id": number, "segmentation": segmentation, "area": area, "iscrowd": crowd}
        annotations.append({**row, **changed})
    return {**content, "annotations": annotations}


def _is_area(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _decodable(segmentation: Any, size: tuple[int, int]) -> dict | list:
    """A checked segmentation as compressed RLE, or its polygons of three points and more."""
    if isinstance(segmentation, dict):
        return compressed_rle(segmentation, size)
    if not segmentation:
        return []
    polygons = [polygon.tolist() for polygon in read_polygons(segmentation, size)]
    return [p for p in polygons if len(p) >= _FEWEST_NUMBERS and len(p) % 2 == 0]


def _area(segmentation: dict | list, size: tuple[int, int]) -> float:
    """In pixels."""
    if isinstance(segmentation, list):
        segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, *size))
    return float(mask_utils.area(segmentation))
