"""What formats of annotations share: images, their instances, and shapes as polygons or masks."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from s4m_d2.data.images import READ_ERRORS

_CORNERS = 64  # of a circle's or an ellipse's polygon
_MALFORMED = (AttributeError, TypeError, IndexError, OverflowError)

Polygon = list[float]  # x0, y0, x1, ... in pixels of the upright image


class Mask(NamedTuple):
    """(H, W) bool pixels from (x, y) of the upright image on; those outside it are none of it."""

    x: int
    y: int
    pixels: np.ndarray


@dataclass
class LabeledImage:
    """What a file says about an image."""

    name: str  # as the file gives it, with forward slashes
    folder: Path | None = None  # that a relative name starts from; None: that of all images
    instances: list[tuple[str, list[Polygon | Mask]]] = field(default_factory=list)  # by class
    left_out: list[tuple[str, str]] = field(default_factory=list)  # where in the file, and why
    size: tuple[int, int] | None = None  # (height, width) that the file states, if it does
    embedded: str = ""  # the image itself in base64, if the file holds it

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


def read_shape(readers: Mapping[str, Callable], kind: Any, shape: dict) -> Any:
    """The part that the reader of this kind of shape gives; ValueError: there is none."""
    if kind not in readers:
        raise ValueError(f"a {kind!r} has no area; known are {', '.join(readers)}")
    return readers[kind](shape)


def class_of(value: object) -> str:
    """The name of a class, which may be a whole number, on one line; ValueError: it is none."""
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
    if len(xs) != len(ys) or len(xs) < 3:
        raise ValueError("a polygon needs 3 points, each with x and y")
    return [value for point in zip(xs, ys, strict=True) for value in numbers(*point)]


def ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> Polygon:
    """A polygon on an ellipse, turned by ``theta`` radians from x to y."""
    angles = 2 * np.pi * np.arange(_CORNERS) / _CORNERS
    turned = (rx * np.cos(angles) + 1j * ry * np.sin(angles)) * np.exp(1j * theta)
    return np.stack([cx + turned.real, cy + turned.imag], axis=1).ravel().tolist()


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    """The polygon of two opposite corners."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]
