"""VGG Image Annotator 2: one file, with the regions of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from annotation_formats.shapes import (
    LabeledImage,
    Polygon,
    class_of,
    ellipse,
    numbers,
    polygon,
    rectangle,
)

_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category")


def matches(content: Any) -> bool:
    """Whether this is a project, or the annotations exported as JSON."""
    entries = _entries(content)
    return bool(entries) and all(isinstance(row, dict) and "regions" in row for row in entries)


def matches_3(content: Any) -> bool:
    """Whether this is a project of VIA 3, whose format is another one."""
    return isinstance(content, dict) and {"project", "file", "metadata"} <= content.keys()


def read(content: dict, class_attribute: str = "", class_name: str = "") -> Iterator[LabeledImage]:
    """The images of a file that :func:`matches`.

    Args:
        content: of the file.
        class_attribute: the region attribute that names the class; "": the only one of a region,
            or the first of class, label, name, type and category.
        class_name: of every instance, whatever attributes it has; "": as the attribute says.
    """
    for entry in _entries(content):
        image = LabeledImage(str(entry.get("filename", "")).replace("\\", "/"))
        regions = entry["regions"]
        rows = list(regions.values()) if isinstance(regions, dict) else regions
        if not isinstance(rows, list):
            image.left_out.append(("regions", "'regions' is no list"))
            rows = []
        for number, region in enumerate(rows):
            with image.reading(f"region {number}"):
                part = _read_shape(region["shape_attributes"])
                label = class_name or _class(region["region_attributes"], class_attribute)
                image.instances.append((label, [part]))
        yield image


def _entries(content: Any) -> list:
    if not isinstance(content, dict):
        return []
    entries = content.get("_via_img_metadata", content)
    return list(entries.values()) if isinstance(entries, dict) else []


def _rect(shape: dict) -> Polygon:
    x, y, width, height = numbers(shape["x"], shape["y"], shape["width"], shape["height"])
    return rectangle(x, y, x + width, y + height)


_SHAPES: dict[str, Callable[[dict], Polygon]] = {
    "polygon": lambda s: polygon(s["all_points_x"], s["all_points_y"]),
    "rect": _rect,
    "circle": lambda s: ellipse(*numbers(s["cx"], s["cy"], s["r"], s["r"])),
    "ellipse": lambda s: ellipse(*numbers(s["cx"], s["cy"], s["rx"], s["ry"], s.get("theta", 0))),
}


def _read_shape(shape: dict) -> Polygon:
    kind = shape["name"]
    if kind not in _SHAPES:
        raise ValueError(f"a {kind!r} has no area; known are {', '.join(_SHAPES)}")
    return _SHAPES[kind](shape)


def _class(attributes: dict, class_attribute: str) -> str:
    if class_attribute:
        names: tuple = (class_attribute,)
    else:
        names = tuple(attributes) if len(attributes) == 1 else _CLASS_ATTRIBUTES
    key = next((name for name in names if name in attributes), None)
    if key is None:
        raise ValueError(
            f"which of its attributes ({', '.join(attributes) or 'none'}) names the class is not "
            "clear: give --class-attribute NAME, or --class-name NAME for one class"
        )
    value = attributes[key]
    if isinstance(value, dict):  # check boxes
        chosen = [name for name, checked in value.items() if checked]
        value = chosen[0] if len(chosen) == 1 else chosen
    return class_of(value)
