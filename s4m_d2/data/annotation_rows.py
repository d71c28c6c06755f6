"""Annotations of one image: whatever form a tool gave them, one form comes out; what a file holds
beside usable instances is collected for one report."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_utils

from s4m_d2.data.segmentations import as_polygons, compressed_rle, is_polygon, read_points
from s4m_d2.errors import DatasetError

Key = int | str | None

_CROWD_FLAGS: dict[Hashable, int] = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1}
_SHOWN = 3  # offenders that a message names
_MANY_CROWDS = 0.1  # of all instances: more are probably meant otherwise


@dataclass(frozen=True)
class Kind:
    """A kind of finding: a short name, what is said behind its count, and what follows from it."""

    short: str
    text: str
    remedy: str


NO_MASK = Kind(
    "without a mask",
    "annotations have no mask, a box at most, and are left out",
    "Draw masks for them, or remove them.",
)
NO_PIXEL = Kind(
    "without a pixel in their image",
    "masks have no pixel in their image and are left out",
    "Coordinates from 0 to 1 have to be multiplied by the image's width and height; others are "
    "those of another image, or of one of another size.",
)
NO_IMAGE = Kind(
    "of images that are not listed",
    "annotations are of images that the file does not list and are left out",
    "List these images, or remove the annotations.",
)
PARTS = Kind(
    "polygons of less than three points",
    "polygons have less than three points (x, y) and are left out",
    "Complete or remove them.",
)
CROWD = Kind(
    "crowds",
    "instances are crowds (iscrowd 1), which nothing is learned from",
    "Set iscrowd to 0 where each is one object.",
)


class Findings:
    """What a file holds beside usable instances, counted by kind, the first few named."""

    def __init__(self) -> None:
        self.notes: list[str] = []  # what was read otherwise than it is written
        self.left_out: dict[Kind, list[str]] = defaultdict(list)
        self.errors: dict[Kind, list[str]] = defaultdict(list)
        self.instances = 0  # that are used

    def refuse(self, text: str, name: object, remedy: str) -> None:
        self.errors[Kind(text, text, remedy)].append(str(name))

    @property
    def summary(self) -> str:
        """What was left out and what was read otherwise, short; "" for a file as it should be."""
        counts = [f"{len(names):,} {kind.short}" for kind, names in self.left_out.items()]
        return "; ".join([f"no targets: {', '.join(counts)}"] * bool(counts) + self.notes)

    @property
    def warnings(self) -> list[str]:
        """A message for each kind that was left out, crowds only where they are many."""
        crowds = len(self.left_out.get(CROWD, ()))
        usual = crowds <= _MANY_CROWDS * (crowds + self.instances)
        shown = {k: names for k, names in self.left_out.items() if not (k is CROWD and usual)}
        return [_message(kind, names) for kind, names in shown.items()]

    def problems(self) -> list[str]:
        """All that makes the file unusable."""
        problems = [_message(kind, names) for kind, names in self.errors.items()]
        if not problems and self.left_out and not self.instances:
            reasons = [_message(kind, names) for kind, names in self.left_out.items()]
            return [f"no instance can be used. {' '.join(reasons)}"]
        return problems

    def raise_for(self, json_file: str) -> None:
        """Raise one DatasetError for all of these."""
        problems = self.problems()
        if len(problems) == 1:
            raise DatasetError(f"{json_file}: {problems[0]}")
        if problems:
            lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
            raise DatasetError(f"{json_file}: {len(problems)} problems:", *lines)


def _message(kind: Kind, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{len(names):,} {kind.text}: {', '.join(names[:_SHOWN])}{more}. {kind.remedy}".strip()


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
