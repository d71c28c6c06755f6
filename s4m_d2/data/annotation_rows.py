"""One image's annotations: whatever form a tool gave them, one form comes out."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_utils

from s4m_d2.data.annotation_findings import CROWD, NO_MASK, NO_PIXEL, PARTS, Findings
from s4m_d2.data.segmentations import as_polygons, compressed_rle, is_polygon, read_points
from s4m_d2.errors import DatasetError

Key = int | str | None

_CROWD_FLAGS: dict[Hashable, int] = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}


def key_of(value: Any) -> Key:
    """An id with one form for 1, 1.0 and "1"; None for what is no id."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return int(value) if value.isdecimal() and value.isascii() and len(value) < 19 else value
    return None


def name_of(annotation: dict) -> str:
    """What to call it in a message."""
    if "id" in annotation:
        return f"id {annotation['id']}"
    return f"without id, of image {annotation.get('image_id')}"


def _number(value: Any) -> float | None:
    """A finite number, which may be written as text."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def side_of(value: Any) -> int | None:
    """A whole number of pixels."""
    number = _number(value)
    return int(number) if number is not None and number >= 1 and number.is_integer() else None


def normalized_annotations(
    rows: Sequence[dict],
    size: tuple[int, int],
    indices: dict[Key, int],
    findings: Findings,
) -> list[dict]:
    """The annotations of an image that can be used, normalized; the others are counted."""
    known: list[tuple[dict, int, int]] = []
    for row in rows:
        flag = row.get("iscrowd")
        crowd = _CROWD_FLAGS.get(flag if isinstance(flag, Hashable) else ())
        index = indices.get(key_of(row.get("category_id")))
        if crowd is None:
            findings.refuse(
                "annotations have an iscrowd that is not 0 or 1", name_of(row), "Correct it."
            )
        elif index is None:
            category = f"{name_of(row)}: {reprlib.repr(row.get('category_id'))}"
            text = "annotations have a category_id that the file does not define"
            findings.refuse(text, category, "Remove them, or complete 'categories'.")
        else:
            known.append((row, crowd, index))
    shapes = _shapes([row for row, _, _ in known], size, findings)
    found: list[tuple[dict, dict, int]] = []
    polygons: list[np.ndarray] = []
    for (row, crowd, index), shape in zip(known, shapes, strict=True):
        parts = shape if isinstance(shape, list) else []
        polygons += parts
        segmentation = [points.tolist() for points in parts] or shape
        if segmentation:
            entry = {"iscrowd": crowd, "category_id": index, "segmentation": segmentation}
            found.append((row, entry, len(parts)))
    return _with_pixels(found, polygons, size, findings)


def _with_pixels(
    found: Sequence[tuple[dict, dict, int]],
    polygons: list[np.ndarray],
    size: tuple[int, int],
    findings: Findings,
) -> list[dict]:
    """The entries whose masks have a pixel, each with its area and box.

    Args:
        found: a row of the file, its entry, and how many of ``polygons`` are its.
    """
    drawn: Iterator[dict] = iter(mask_utils.frPyObjects(polygons, *size) if polygons else ())
    rles = []
    for _, entry, count in found:
        parts = [*itertools.islice(drawn, count)] or [entry["segmentation"]]
        rles.append(parts[0] if len(parts) == 1 else mask_utils.merge(parts))
    annotations = []
    for (row, entry, _), rle, area in zip(found, rles, mask_utils.area(rles), strict=True):
        if not area:
            where = _extent(entry["segmentation"], size)
            findings.left_out[NO_PIXEL].append(f"{name_of(row)} ({where})")
            continue
        given = _number(row.get("area"))
        entry["area"] = given if given and given > 0 else float(area)
        entry["bbox"] = _box(row.get("bbox")) or mask_utils.toBbox(rle).tolist()
        entry["bbox_mode"] = BoxMode.XYWH_ABS
        annotations.append(entry)
        if entry["iscrowd"]:
            findings.left_out[CROWD].append(name_of(row))
        else:
            findings.instances += 1
    return annotations


def _shapes(
    rows: Sequence[dict], size: tuple[int, int], findings: Findings
) -> Iterator[list[np.ndarray] | dict | None]:
    """Of each row: flat polygons of three points and more, or compressed RLE."""
    given = [
        as_polygons(segmentation) if isinstance(segmentation, list) else []
        for segmentation in (row.get("segmentation") for row in rows)
    ]
    try:
        points = iter(read_points([*itertools.chain.from_iterable(given)], size))
    except DatasetError:  # of which row, is found one by one
        points = None
    for row, polygons in zip(rows, given, strict=True):
        yield _shape(row, polygons, points, size, findings)


def _shape(
    row: dict,
    given: list,
    points: Iterator[np.ndarray] | None,
    size: tuple[int, int],
    findings: Findings,
) -> list[np.ndarray] | dict | None:
    """A row's shape; what is none is counted.

    Args:
        given: its list of polygons, if it is one.
        points: those of this and the later rows, if all could be read.
    """
    segmentation: Any = row.get("segmentation")
    try:
        if isinstance(segmentation, dict) and segmentation.get("counts"):
            return compressed_rle(segmentation, size)
        if not isinstance(segmentation, list | dict | None):
            raise DatasetError("expected polygons or an RLE")
        read = read_points(given, size) if points is None else itertools.islice(points, len(given))
        polygons = [*filter(is_polygon, read)]
    except DatasetError as error:
        remedy = "Correct or remove them."
        findings.refuse("segmentations cannot be drawn", f"{name_of(row)} ({error})", remedy)
        return None
    if not polygons:
        findings.left_out[NO_MASK].append(name_of(row))
    elif len(polygons) < len(given):
        findings.left_out[PARTS] += [name_of(row)] * (len(given) - len(polygons))
    return polygons


def _extent(shape: list | dict, size: tuple[int, int]) -> str:
    """Where a mask without a pixel lies."""
    if isinstance(shape, dict):
        return "an empty RLE"
    points = np.concatenate(shape).reshape(-1, 2)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    where = f"x from {left:g} to {right:g}, y from {top:g} to {bottom:g}"
    return f"{where} in an image of {size[1]} x {size[0]}"


def _box(values: Any) -> list[float] | None:
    """[x, y, width, height] in pixels, if that is what the file has."""
    try:
        box = [float(value) for value in values] if isinstance(values, list) else []
    except (TypeError, ValueError, OverflowError):
        return None
    is_box = len(box) == 4 and math.isfinite(sum(box)) and box[2] > 0 and box[3] > 0
    return box if is_box else None
