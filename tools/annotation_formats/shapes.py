"""What formats of annotations share: images, their instances, and shapes as polygons or masks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from s4m_d2.data.images import READ_ERRORS

_CORNERS = 64  # of a circle's or an ellipse's polygon
_FEWEST_POINTS = 3
_MALFORMED = (AttributeError, TypeError, IndexError, OverflowError)

Polygon = list[float]  # x0, y0, x1, ... in pixels of the upright image


@dataclass
class Mask:
    """A mask of a part of an image; pixels outside the image are none of it.

    Attributes:
        x, y: of its first pixel, in pixels of the upright image.
        pixels: (H, W) bool.
    """

    x: int
    y: int
    pixels: np.ndarray


@dataclass
class LabeledImage:
    """What a file says about an image.

    Attributes:
        name: as the file gives it, with forward slashes.
        folder: that a relative name starts from; None: that of all images.
        instances: (class, parts).
        left_out: (where in the file, why) of what could not be read.
        size: (height, width) that the file states, if it does.
        embedded: the image itself in base64, if the file holds it.
    """

    name: str
    folder: Path | None = None
    instances: list[tuple[str, list[Polygon | Mask]]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    embedded: str = ""

    @contextmanager
    def reading(self, where: str) -> Iterator[None]:
        """What the block raises for lacking or bad values is why ``where`` is left out."""
        try:
            yield
        except KeyError as error:
            self.left_out.append((where, f"it lacks {error}"))
        except _MALFORMED as error:
            self.left_out.append((where, f"it is malformed ({error})"))
        except READ_ERRORS as error:
            self.left_out.append((where, str(error)))


def class_of(value: object) -> str:
    """The name of a class, which may be a whole number, on one line.

    Raises:
        ValueError: it is none, or no Unicode.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"its class is {value!r}; expected a name")
    text.encode()
    return " ".join(text.split())


def numbers(*values: object) -> list[float]:
    """Raises: ValueError or TypeError: a value is no finite number."""
    found = [float(value) for value in values if not isinstance(value, bool)]
    if len(found) < len(values) or not all(map(math.isfinite, found)):
        raise ValueError("a coordinate is no finite number")
    return found


def polygon(xs: list, ys: list) -> Polygon:
    """Raises: ValueError: there are fewer than three points, or other numbers of x and y."""
    if len(xs) != len(ys) or len(xs) < _FEWEST_POINTS:
        raise ValueError(f"a polygon needs {_FEWEST_POINTS} points, each with x and y")
    return [value for point in zip(xs, ys, strict=True) for value in numbers(*point)]


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
