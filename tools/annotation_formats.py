"""Reading the files of annotation tools: VGG Image Annotator 2 and LabelMe."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Polygon = list[float]  # x0, y0, x1, ... in pixels of the upright image

_CORNERS = 64  # of a circle's or an ellipse's polygon
_FEWEST_POINTS = 3
_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category")
# What reading a shape raises that lacks a value or has one of another kind.
_BAD_VALUES = (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError)


@dataclass
class LabeledImage:
    """What a file says about an image.

    Attributes:
        name: as the file gives it, with forward slashes.
        folder: that a relative name starts from; None: that of all images.
        instances: (class, polygons).
        problems: what could not be read, as parts of sentences.
        size: (height, width) that the file states, if it does.
    """

    name: str
    folder: Path | None = None
    instances: list[tuple[str, list[Polygon]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> Polygon:
    """A polygon on an ellipse, turned by ``theta`` radians from x to y."""
    points = []
    for corner in range(_CORNERS):
        angle = 2 * math.pi * corner / _CORNERS
        x, y = rx * math.cos(angle), ry * math.sin(angle)
        points += [
            cx + x * math.cos(theta) - y * math.sin(theta),
            cy + x * math.sin(theta) + y * math.cos(theta),
        ]
    return points


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """The polygon of two opposite corners."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it cannot be read; says why, as part of a sentence.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"this is no valid JSON ({error})") from error


def _numbers(*values: object) -> list[float]:
    numbers = [float(value) for value in values if not isinstance(value, bool)]
    if len(numbers) < len(values) or not all(map(math.isfinite, numbers)):
        raise ValueError("a coordinate is no finite number")
    return numbers


def _polygon(xs: list, ys: list) -> Polygon:
    if len(xs) != len(ys) or len(xs) < _FEWEST_POINTS:
        raise ValueError(f"a polygon needs {_FEWEST_POINTS} points, each with x and y")
    return [value for point in zip(xs, ys, strict=True) for value in _numbers(*point)]


# VGG Image Annotator 2: one file, regions by image


def _via_rect(s: dict) -> Polygon:
    x, y, width, height = _numbers(s["x"], s["y"], s["width"], s["height"])
    return rectangle(x, y, x + width, y + height)


_VIA_SHAPES: dict[str, Callable[[dict], Polygon]] = {
    "polygon": lambda s: _polygon(s["all_points_x"], s["all_points_y"]),
    "rect": _via_rect,
    "circle": lambda s: ellipse(*_numbers(s["cx"], s["cy"], s["r"], s["r"])),
    "ellipse": lambda s: ellipse(
        *_numbers(s["cx"], s["cy"], s["rx"], s["ry"], s.get("theta", 0.0))
    ),
}


def read_via(path: Path, class_attribute: str = "") -> Iterator[LabeledImage]:
    """The images of a VIA 2 project, or of its export of annotations as JSON.

    Args:
        path: JSON file.
        class_attribute: the region attribute that names the class; "": the only one of a region,
            or the first of class, label, name, type and category.

    Raises:
        ValueError: the file is none of VIA's.
    """
    content = read_json(path)
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    entries = list(content.values()) if isinstance(content, dict) else [None]
    if not all(isinstance(entry, dict) and "regions" in entry for entry in entries):
        raise ValueError("this is no JSON file of VIA 2: its entries have no 'regions'")
    for entry in entries:
        image = LabeledImage(str(entry.get("filename", "")).replace("\\", "/"))
        regions = entry["regions"]
        rows = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(rows, list):
            image.problems.append("'regions' is no list")
            rows = []
        for number, region in enumerate(rows):
            _take(image, f"region {number}", lambda r=region: _via_region(r, class_attribute))
        yield image


def _via_region(region: dict, class_attribute: str) -> tuple[str, list[Polygon]]:
    shape = region["shape_attributes"]
    read = _shape_reader(_VIA_SHAPES, shape["name"])
    return _via_class(region["region_attributes"], class_attribute), [read(shape)]


def _via_class(attributes: dict, class_attribute: str) -> str:
    keys = (
        [class_attribute] if class_attribute else [k for k in _CLASS_ATTRIBUTES if k in attributes]
    )
    if not keys and len(attributes) == 1:
        keys = list(attributes)
    if not keys:
        raise ValueError(
            f"which of its attributes ({', '.join(attributes) or 'none'}) names the class is not "
            "clear: give --class-attribute"
        )
    value = attributes.get(keys[0])
    if isinstance(value, dict):  # check boxes
        chosen = [name for name, checked in value.items() if checked]
        value = chosen[0] if len(chosen) == 1 else None
    return _class_name(value)


# LabelMe: a file an image


def _labelme_circle(points: list) -> Polygon:
    (cx, cy), (x, y) = (_numbers(*point) for point in points)
    radius = math.hypot(x - cx, y - cy)
    return ellipse(cx, cy, radius, radius)


def _labelme_rectangle(points: list) -> Polygon:
    if len(points) == 4:  # newer versions write all corners
        return _polygon(*map(list, zip(*points, strict=True)))
    first, second = (_numbers(*point) for point in points)
    return rectangle(*first, *second)


_LABELME_SHAPES: dict[str, Callable[[list], Polygon]] = {
    "polygon": lambda points: _polygon(*map(list, zip(*points, strict=True))),
    "rectangle": _labelme_rectangle,
    "circle": _labelme_circle,
}


def read_labelme(path: Path) -> LabeledImage:
    """The image of a LabelMe file. Shapes of one label and one group are parts of one instance.

    Raises:
        ValueError: the file is none of LabelMe's.
    """
    content = read_json(path)
    keys = {"shapes": list, "imagePath": str}
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), kind) for key, kind in keys.items()
    ):
        raise ValueError("this is no file of LabelMe: it lacks 'shapes' or 'imagePath'")
    name = os.path.normpath(content["imagePath"].replace("\\", "/")).replace(os.sep, "/")
    image = LabeledImage(name, path.parent)
    size = content.get("imageHeight"), content.get("imageWidth")
    if all(isinstance(side, int) for side in size):
        image.size = size
    groups: dict[tuple[str, Any], list[Polygon]] = {}
    for number, shape in enumerate(content["shapes"]):
        before = len(image.instances)
        _take(image, f"shape {number}", lambda s=shape: _labelme_shape(s))
        group = shape.get("group_id") if isinstance(shape, dict) else None
        if len(image.instances) == before or group is None:
            continue
        label, polygons = image.instances[-1]
        if (label, str(group)) in groups:
            groups[label, str(group)] += polygons
            image.instances.pop()
        else:
            groups[label, str(group)] = polygons
    return image


def _labelme_shape(shape: dict) -> tuple[str, list[Polygon]]:
    read = _shape_reader(_LABELME_SHAPES, shape.get("shape_type") or "polygon")
    return _class_name(shape["label"]), [read(shape["points"])]


def _take(image: LabeledImage, where: str, read: Callable[[], tuple[str, list[Polygon]]]) -> None:
    """Add an instance, or say what is wrong with it."""
    try:
        image.instances.append(read())
    except _BAD_VALUES as error:
        missing = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        image.problems.append(f"{where} is left out: {missing}")


def _shape_reader(shapes: dict[str, Callable], kind: str) -> Callable:
    if kind not in shapes:
        raise ValueError(f"a {kind!r} has no area; known are {', '.join(shapes)}")
    return shapes[kind]


def _class_name(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its class is {value!r}; expected a name")
    return value.strip()
