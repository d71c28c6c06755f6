"""VGG Image Annotator 2: one file, with the regions of each image."""

from collections.abc import Callable, Iterator
from typing import Any

from annotation_formats import shapes
from annotation_formats.shapes import LabeledImage, Polygon

_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category")


def matches(content: Any) -> bool:
    """Whether this is a project, or the annotations exported as JSON."""
    entries = _entries(content)
    return bool(entries) and all(isinstance(row, dict) and "regions" in row for row in entries)


def read(content: dict, class_attribute: str = "", class_name: str = "") -> Iterator[LabeledImage]:
    """The images of a file that :func:`matches`; ``class_name``: of every instance.

    Without a ``class_attribute``, the class is a region's only attribute, or the first of class,
    label, name, type and category.
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
                shape = region["shape_attributes"]
                part = shapes.read_shape(_SHAPES, shape["name"], shape)
                label = class_name or _class(region["region_attributes"], class_attribute)
                image.instances.append((label, [part]))
        yield image


def _entries(content: Any) -> list:
    if not isinstance(content, dict):
        return []
    entries = content.get("_via_img_metadata", content)
    return list(entries.values()) if isinstance(entries, dict) else []


def _rect(shape: dict) -> Polygon:
    x, y, width, height = _get(shape, "x", "y", "width", "height")
    return shapes.rectangle(x, y, x + width, y + height)


def _get(shape: dict, *keys: str) -> list[float]:
    return shapes.numbers(*(shape[key] for key in keys))


_SHAPES: dict[str, Callable[[dict], Polygon]] = {
    "polygon": lambda s: shapes.polygon(s["all_points_x"], s["all_points_y"]),
    "rect": _rect,
    "circle": lambda s: shapes.ellipse(*_get(s, "cx", "cy", "r", "r")),
    "ellipse": lambda s: shapes.ellipse(*_get({"theta": 0, **s}, "cx", "cy", "rx", "ry", "theta")),
}


def _class(attributes: dict, class_attribute: str) -> str:
    names = tuple(attributes) if len(attributes) == 1 else _CLASS_ATTRIBUTES
    names = (class_attribute,) if class_attribute else names
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
    return shapes.class_of(value)
