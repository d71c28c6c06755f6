"""Drawing on pictures: instances, heat maps, marks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from s4m_d2.errors import printable
from s4m_d2.structures import RLEMasks, mask_boxes

READABLE_SIDE = 320  # px; images with a shorter side are enlarged
FILL_ALPHA = 0.45
CONTOUR_WIDTH = 2  # px
TEXT_SHARE = 18  # text height is the image's height divided by this
MIN_TEXT = 11  # px
MOST_LETTERS = 30  # of a class's name
TEXT_STROKE = 2  # px
SHIFTS = (0, -1, 1, -2, 2, -3, 3)  # lines by which a name may be moved to avoid others

GOLDEN_RATIO = 0.618034  # step between hues, which spreads any number of them evenly
FEWEST_COLORS = 12
MOST_NAMED = 60  # instances

MARK_SHARE, FEWEST_MARK_PIXELS = 28, 4  # a mark's radius is a share of the shorter side, at least 4
EDGE_WIDTH = 2  # px, of the white line inside the black one

# A mask inside its box: (h, w) bool, and the box (x0, y0, x1, y1) in the picture.
Window = tuple[np.ndarray, tuple[int, int, int, int]]


def overlay(
    image: np.ndarray,
    masks: np.ndarray | Tensor | RLEMasks,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    scale: int | None = None,
) -> np.ndarray:
    """Draw instances on an image: filled, outlined and named, touching ones in different colors.

    More than MOST_NAMED instances are not named; nor is the only class.

    Args:
        image: (H, W, 3) uint8, RGB.
        masks: (N, H, W) bool, or encoded.
        labels: N indices into ``class_names``.
        scores: N numbers in [0, 1], written as percentages; None: not written.
        scale: integer factor of enlargement; None: such that names are readable.

    Returns:
        (scale·H, scale·W, 3) uint8.
    """
    masks = masks if isinstance(masks, RLEMasks) else torch.as_tensor(masks)
    scale = scale or readable_scale(image)
    picture = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    windows = [_window(mask, scale) for mask in masks]
    colors = box_colors(np.array([box for _, box in windows]), picture.shape[:2])
    areas = [mask.sum() for mask, _ in windows]
    filled = picture.copy()
    for index in sorted(range(len(windows)), key=lambda i: (-areas[i], -i)):
        mask, (x0, y0, x1, y1) = windows[index]
        filled[y0:y1, x0:x1][mask] = colors[index]
    picture = cv2.addWeighted(picture, 1 - FILL_ALPHA, filled, FILL_ALPHA, 0)
    for (mask, box), color in zip(windows, colors, strict=True):
        lines, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=box[:2]
        )
        cv2.drawContours(picture, lines, -1, color, CONTOUR_WIDTH)
    if len(windows) > MOST_NAMED:
        return picture
    names = class_names if len(class_names) > 1 else [""]
    texts = [printable(names[label], MOST_LETTERS) for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}".strip() for text, score in zip(texts, scores, strict=True)]
    return _write_names(picture, windows, texts)


def _window(mask: Tensor, scale: int) -> Window:
    x0, y0, x1, y1 = (int(side) for side in mask_boxes(mask[None])[0])
    enlarged = mask[y0:y1, x0:x1].numpy().repeat(scale, 0).repeat(scale, 1)
    return enlarged, (scale * x0, scale * y0, scale * x1, scale * y1)


def readable_scale(image: np.ndarray) -> int:
    """The factor by which an (H, W, 3) picture is enlarged, so that names are readable."""
    return -(-READABLE_SIDE // min(image.shape[:2]))


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) farthest inside an (H, W) bool mask."""
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def box_colors(boxes: np.ndarray, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Choose an RGB color for each of N boxes (x0, y0, x1, y1) in an image of (H, W).

    Touching boxes (with gaps up to a hundredth of the image) have different colors. The choice is
    deterministic.
    """
    gap = max(image_size) / 100
    starts, ends = np.split(boxes.reshape(-1, 4), 2, axis=1)
    meets = (starts[:, None] <= ends + gap) & (ends[:, None] + gap >= starts)
    touching = np.logical_and.reduce(meets, axis=2)
    palette = _palette(max(FEWEST_COLORS, int(touching.sum(1).max(initial=0))))
    chosen: list[int] = []
    for i in range(len(touching)):
        taken = {chosen[j] for j in np.flatnonzero(touching[i, :i])}
        order = ((i + step) % len(palette) for step in range(len(palette)))
        chosen.append(next(color for color in order if color not in taken))
    return [palette[color] for color in chosen]


def _palette(count: int) -> list[tuple[int, int, int]]:
    """Saturated colors; neighbors in the list differ much in hue, and in brightness."""
    number = np.arange(count)
    value = np.where(number % 2, 1.0, 0.8)
    hsv = np.stack([number * GOLDEN_RATIO % 1, np.full(count, 0.9), value], axis=1)
    return [tuple(color) for color in np.rint(255 * hsv_to_rgb(hsv)).astype(int).tolist()]


@functools.lru_cache
def text_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, ``size`` in px."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _write_names(image: np.ndarray, windows: Sequence[Window], texts: Sequence[str]) -> np.ndarray:
    """Write each text inside its mask, moved up or down to avoid other texts."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(MIN_TEXT, height // TEXT_SHARE)
    font = text_font(size)
    written: list[tuple[float, float, float]] = []  # center and half the width of each text
    for i in sorted(range(len(windows)), key=lambda i: -windows[i][0].sum()):
        mask, (left, top, *_) = windows[i]
        if not texts[i] or not mask.any():
            continue
        inside_x, inside_y = deepest_point(mask)
        half = draw.textlength(texts[i], font=font) / 2 + TEXT_STROKE
        x = float(np.clip(left + inside_x, half, max(half, width - half)))
        bottom = max(size, height - size)
        lines = [float(np.clip(top + inside_y + size * step, size, bottom)) for step in SHIFTS]
        free = (
            line
            for line in lines
            if all(abs(line - v) >= size or abs(x - u) >= half + w for u, v, w in written)
        )
        y = next(free, lines[0])
        written.append((x, y, half))
        stroke: dict[str, Any] = {"stroke_width": TEXT_STROKE, "stroke_fill": "black"}
        draw.text((x, y), texts[i], "white", font, "mm", **stroke)
    return np.asarray(picture)


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
