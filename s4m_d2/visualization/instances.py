"""Pictures of instances."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from s4m_d2.errors import InputError, printable
from s4m_d2.structures import RLEMasks, mask_boxes

READABLE_SIDE = 320  # px; images with a shorter side are enlarged
FILL_ALPHA = 0.45
CONTOUR_WIDTH = 2  # px
TEXT_SHARE = 18  # text height is the image's height divided by this
MIN_TEXT = 11  # px
MOST_LETTERS = 30  # of a class's name
TEXT_STROKE = 2  # px
SHIFTS = (0, -1, 1, -2, 2, -3, 3)  # lines by which a name gives way to others

GOLDEN_RATIO = 0.618034  # steps of it spread any number of hues evenly
FEWEST_COLORS = 12
MOST_NAMED = 60  # instances


@dataclass(frozen=True)
class _Window:
    """A mask where it is: (h, w) bool at the place ``rows``, ``columns`` of the picture."""

    mask: np.ndarray
    rows: slice
    columns: slice

    @classmethod
    def of(cls, mask: Tensor, scale: int) -> _Window:
        """Of an (H, W) bool mask, enlarged."""
        x0, y0, x1, y1 = (int(side) for side in mask_boxes(mask[None])[0])
        enlarged = mask[y0:y1, x0:x1].numpy().repeat(scale, 0).repeat(scale, 1)
        return cls(enlarged, slice(scale * y0, scale * y1), slice(scale * x0, scale * x1))

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.columns.start, self.rows.start, self.columns.stop, self.rows.stop


def overlay(
    image: np.ndarray,
    masks: np.ndarray | Tensor | RLEMasks,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    scale: int | None = None,
) -> np.ndarray:
    """Draw instances on an image: filled, outlined and named, touching ones in different colors.

    Beside picture and masks, the memory that this takes is that of the parts where masks are. Of
    more than MOST_NAMED instances no names are written.

    Args:
        image: (H, W, 3) uint8, RGB.
        masks: (N, H, W) bool, or encoded.
        labels: N indices into ``class_names``.
        class_names: names.
        scores: N numbers in [0, 1], written as percentages; None: not written.
        scale: integer factor by which the picture is enlarged; None: so that names are readable.

    Returns:
        (scale·H, scale·W, 3) uint8.

    Raises:
        InputError: shapes, dtypes or lengths disagree.
    """
    if not isinstance(masks, RLEMasks):
        masks = torch.as_tensor(masks)
    _check_instances(image, masks, labels, scores)
    scale = scale or readable_scale(image)
    picture = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    windows = [_Window.of(mask, scale) for mask in masks]
    colors = box_colors(np.array([window.box for window in windows]), picture.shape[:2])
    _fill(picture, windows, colors)
    for window, color in zip(windows, colors, strict=True):
        outlines, _ = cv2.findContours(
            window.mask.astype(np.uint8),
            cv2.RETR_EXTERNAL,
            cv2.CHAIN_APPROX_NONE,
            offset=window.box[:2],
        )
        cv2.drawContours(picture, outlines, -1, color, CONTOUR_WIDTH)
    if len(windows) > MOST_NAMED:
        return picture
    texts = [printable(class_names[label], MOST_LETTERS) for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}" for text, score in zip(texts, scores, strict=True)]
    return _write_names(picture, windows, texts)


def readable_scale(image: np.ndarray) -> int:
    """The factor by which an (H, W, 3) picture is enlarged, so that names are readable."""
    return -(-READABLE_SIDE // min(image.shape[:2]))


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) farthest inside an (H, W) bool mask."""
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def _check_instances(
    image: np.ndarray, masks: Tensor | RLEMasks, labels: Sequence, scores: Sequence | None
) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    size: tuple[int, ...]
    if isinstance(masks, RLEMasks):
        size, dtype = masks.image_size, torch.bool
    else:
        size, dtype = tuple(masks.shape[1:]), masks.dtype
    if dtype != torch.bool or size != image.shape[:2]:
        raise InputError(
            f"masks must be (N, {image.shape[0]}, {image.shape[1]}) bool like the image, "
            f"got {(len(masks), *size)} {dtype}"
        )
    if len(labels) != len(masks) or (scores is not None and len(scores) != len(masks)):
        raise InputError(f"{len(masks)} masks need as many labels and scores")


def _fill(
    picture: np.ndarray, windows: Sequence[_Window], colors: Sequence[tuple[int, int, int]]
) -> None:
    """Color each pixel as the smallest mask that covers it, of equals the first."""
    owner = np.full(picture.shape[:2], -1, dtype=np.int32)
    areas = [window.mask.sum() for window in windows]
    for index in sorted(range(len(windows)), key=lambda i: (-areas[i], -i)):
        window = windows[index]
        owner[window.rows, window.columns][window.mask] = index
    for index, (window, color) in enumerate(zip(windows, colors, strict=True)):
        own = owner[window.rows, window.columns] == index
        part = picture[window.rows, window.columns]
        part[own] = (1 - FILL_ALPHA) * part[own] + FILL_ALPHA * np.array(color)


def box_colors(boxes: np.ndarray, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """An RGB color for each of N boxes (x0, y0, x1, y1) in an image of (H, W).

    Those that touch have different ones; a gap of a hundredth of the image still counts as
    touching. The same boxes always get the same colors.
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
    """Saturated colors; neighbors in the list have distant hues and another brightness."""
    colors = []
    for i in range(count):
        value = 1.0 if i % 2 else 0.8
        rgb = colorsys.hsv_to_rgb(i * GOLDEN_RATIO % 1, 0.9, value)
        red, green, blue = (round(255 * channel) for channel in rgb)
        colors.append((red, green, blue))
    return colors


def _write_names(image: np.ndarray, windows: Sequence[_Window], texts: Sequence[str]) -> np.ndarray:
    """Write each text inside its mask, or as near above or below as other texts let it."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(MIN_TEXT, height // TEXT_SHARE)
    font = ImageFont.load_default(size)
    written: list[tuple[float, float, float]] = []  # center and half the width of each text
    for i in sorted(range(len(windows)), key=lambda i: -windows[i].mask.sum()):
        window = windows[i]
        if not window.mask.any():
            continue
        center_x, center_y = deepest_point(window.mask)
        center_x, center_y = center_x + window.columns.start, center_y + window.rows.start
        half = draw.textlength(texts[i], font=font) / 2 + TEXT_STROKE
        x = float(np.clip(center_x, half, max(half, width - half)))
        bottom = max(size, height - size)
        lines = [float(np.clip(center_y + size * step, size, bottom)) for step in SHIFTS]
        free = (
            line
            for line in lines
            if all(abs(line - v) >= size or abs(x - u) >= half + w for u, v, w in written)
        )
        y = next(free, lines[0])
        written.append((x, y, half))
        draw.text(
            *((x, y), texts[i], "white", font),
            anchor="mm",
            stroke_width=TEXT_STROKE,
            stroke_fill="black",
        )
    return np.asarray(picture)
