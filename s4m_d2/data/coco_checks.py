"""What a COCO file must hold before it becomes records: the user hears of mistakes at once."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from s4m_d2.data.segmentations import check_segmentation
from s4m_d2.errors import DatasetError


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 1 and value == value // 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
    )


def _is_anything(value: Any) -> bool:
    return True


_ID = ("a number or a text", _is_id)
_SIZE = ("a whole number of pixels", _is_size)
_NAME = ("a text", _is_name)
#: Sections, their keys, and what the values must be.
_SECTIONS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {"id": _ID, "file_name": _NAME, "height": _SIZE, "width": _SIZE},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        # A box without area passes, as COCO has some: boxes are taken from the masks.
        "bbox": ("four finite numbers [x, y, width, height]", _is_box),
        "segmentation": ("", _is_anything),  # looked at once its image is chosen
    },
    "categories": {"id": _ID, "name": _NAME},
}


def check_content(content: Any, json_file: str) -> None:
    """Refuse what is no COCO file of instances, or refers to what it does not define.

    Raises:
        DatasetError: names the file, the entry, and what it should hold.
    """
    for section, values in _SECTIONS.items():
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise DatasetError(
                f"{json_file} has no list '{section}': it is no COCO file. Give the file of "
                "instances, such as instances_train2017.json."
            )
        for index, row in enumerate(rows):
            _check_row(row, values, f"{json_file}: entry {index} of '{section}'")
        if len({row["id"] for row in rows}) < len(rows):
            raise DatasetError(
                f"{json_file}: the ids of '{section}' are not unique. Number the entries anew."
            )
    if not content["categories"]:
        raise DatasetError(f"{json_file}: 'categories' is empty. List the classes there.")
    known = {
        "image_id": {row["id"] for row in content["images"]},
        "category_id": {row["id"] for row in content["categories"]},
    }
    for annotation in content["annotations"]:
        for key, ids in known.items():
            if annotation[key] not in ids:
                raise DatasetError(
                    f"{json_file}: annotation {annotation['id']} has {key} {annotation[key]}, "
                    "which the file does not define. Remove the annotation or complete the file."
                )


def _check_row(row: Any, values: dict, where: str) -> None:
    lacking = [key for key in values if key not in row] if isinstance(row, dict) else list(values)
    if lacking:
        raise DatasetError(f"{where} lacks {', '.join(lacking)}. Add what is missing.")
    for key, (expected, passes) in values.items():
        if not passes(row[key]):
            raise DatasetError(
                f"{where} has {key} {reprlib.repr(row[key])}; expected {expected}. Correct it."
            )


def check_chosen(
    images: Sequence[dict], annotations: Sequence[dict], json_file: str, image_root: str
) -> None:
    """Look closer at the images that are used, and at their annotations.

    Polygons of less than three points pass: Detectron2's loader leaves them out, with a warning.

    Args:
        images, annotations: entries that passed :func:`check_content`.
        json_file: for messages.
        image_root: the folder in which all images must lie.

    Raises:
        DatasetError: a file name leads out of ``image_root``, or a segmentation is malformed or of
            another size than its image.
    """
    root = os.path.abspath(image_root)
    sizes = {}
    for image in images:
        path = os.path.abspath(os.path.join(root, image["file_name"]))
        if os.path.commonpath((root, path)) != root:
            raise DatasetError(
                f"{json_file}: the file_name {image['file_name']} leads out of the folder of "
                f"images {image_root}. Write file names relative to that folder."
            )
        sizes[image["id"]] = (image["height"], image["width"])
    for annotation in annotations:
        segmentation = annotation["segmentation"]
        if annotation.get("iscrowd", 0) and not segmentation:
            continue
        try:
            check_segmentation(segmentation, sizes[annotation["image_id"]])
        except DatasetError as error:
            raise DatasetError(
                f"{json_file}: annotation {annotation['id']}: {error}. Correct or remove it."
            ) from error
