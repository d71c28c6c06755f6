"""Heat maps, and marks on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib
import numpy as np

MARK_SHARE, FEWEST_MARK_PIXELS = 28, 4  # a mark's radius is a share of the shorter side, at least 4
EDGE_WIDTH = 2  # px, of the white line inside the black one


@dataclass(frozen=True)
class ColorScale:
    """A color scale, which several pictures can share."""

    low: float  #: value of the first color, and of all below
    high: float  #: of the last color; above ``low``
    label: str = ""  #: for the color bar

    def colors(self, values: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB of (H, W) numbers."""
        shares = (values - self.low) / (self.high - self.low)
        return matplotlib.colormaps["viridis"](shares, bytes=True)[..., :3]


def heat_map(
    values: np.ndarray,
    size: tuple[int, int],
    scale: ColorScale,
    cells: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draw a grid of numbers, interpolated linearly between the cells' centers.

    Args:
        values: (rows, columns) float.
        size: (H, W) of the picture.
        cells: number of (rows, columns) that the picture covers, from the grid's upper left corner;
            default: all. Beyond the grid the last ones are repeated.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    rows, columns = cells or values.shape
    y, x = (
        np.clip((np.arange(n) + 0.5) / n * covered - 0.5, 0, there - 1).astype(np.float32)
        for n, covered, there in zip(size, (rows, columns), values.shape, strict=True)
    )
    x, y = np.meshgrid(x, y)
    source = np.asarray(values, dtype=np.float32)
    return scale.colors(cv2.remap(source, x, y, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE))


def mark_point(picture: np.ndarray, point: Sequence[float]) -> np.ndarray:
    """Copy an (H, W, 3) uint8 picture and draw a ring around ``point``, (x, y) in pixels."""
    marked = picture.copy()
    radius = max(FEWEST_MARK_PIXELS, min(picture.shape[:2]) // MARK_SHARE)
    center = tuple(int(value) for value in point)
    cv2.circle(marked, center, radius, (0, 0, 0), 2 * EDGE_WIDTH, cv2.LINE_AA)
    cv2.circle(marked, center, radius, (255, 255, 255), EDGE_WIDTH, cv2.LINE_AA)
    return marked


def outline(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Copy a picture and draw a black and white line around a mask.

    Args:
        picture: (n·H, n·W, 3) uint8, RGB: as enlarged by :func:`overlay`.
        mask: (H, W) bool.
    """
    outlined, size = picture.copy(), picture.shape[1::-1]
    large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    lines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(outlined, lines, -1, (0, 0, 0), 3 * EDGE_WIDTH)
    cv2.drawContours(outlined, lines, -1, (255, 255, 255), EDGE_WIDTH)
    return outlined
