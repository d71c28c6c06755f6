"""LabelMe and its descendant X-AnyLabeling: one file per image."""

import base64
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from annotation_formats import shapes
from annotation_formats.shapes import LabeledImage, Mask, Polygon


def matches(content: Any) -> bool:
    """Whether this is a file of LabelMe."""
    if not isinstance(content, dict):
        return False
    return isinstance(content.get("shapes"), list) and isinstance(content.get("imagePath"), str)


def read(content: dict, folder: Path, class_name: str = "") -> LabeledImage:
    """The image of a file that :func:`matches`. Shapes of one label and group are one instance.

    ``class_name``: of every instance, whatever its label; "": the label.
    """
    image = LabeledImage(os.path.normpath(content["imagePath"].replace("\\", "/")), folder)
    size = content.get("imageHeight"), content.get("imageWidth")
    if all(isinstance(side, int) for side in size):
        image.size = size
    if isinstance(content.get("imageData"), str):
        image.embedded = content["imageData"]
    instances: dict[tuple, list[Polygon | Mask]] = {}
    for number, shape in enumerate(content["shapes"]):
        with image.reading(f"shape {number}"):
            part = shapes.read_shape(_SHAPES, shape.get("shape_type") or "polygon", shape)
            label, group = shape.get("label"), shape.get("group_id")
            instance = number if group is None else str(group)
            key = (class_name or shapes.class_of(label), str(label), instance)
            instances.setdefault(key, []).append(part)
    image.instances = [(label, parts) for (label, *_), parts in instances.items()]
    return image


def _corners(shape: dict) -> Polygon:
    return shapes.polygon(*map(list, zip(*shape["points"], strict=True)))


def _rectangle(shape: dict) -> Polygon:
    if len(shape["points"]) == 4:  # newer versions write all corners
        return _corners(shape)
    first, second = (shapes.numbers(*point) for point in shape["points"])
    return shapes.rectangle(*first, *second)


def _circle(shape: dict) -> Polygon:
    (cx, cy), (x, y) = (shapes.numbers(*point) for point in shape["points"])
    radius = math.hypot(x - cx, y - cy)
    return shapes.ellipse(cx, cy, radius, radius)


def _mask(shape: dict) -> Mask:
    """The points are the first and the last pixel of the box that the mask, a PNG, fills."""
    x0, y0, x1, y1 = (int(value) for point in shape["points"] for value in shapes.numbers(*point))
    box = (x1 - x0 + 1, y1 - y0 + 1)
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as picture:
        if picture.size != box:
            raise ValueError(f"its mask has (width, height) {picture.size}, its box {box}")
        return Mask(x0, y0, np.asarray(picture.convert("L")) > 0)


_SHAPES: dict[str, Callable[[dict], Polygon | Mask]] = {
    # The last two are X-AnyLabeling's, a turned rectangle among them.
    **dict.fromkeys(("polygon", "oriented_rectangle", "rotation", "quadrilateral"), _corners),
    "rectangle": _rectangle,
    "circle": _circle,
    "mask": _mask,
}
