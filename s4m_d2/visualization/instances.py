"""Drawing of instances on an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.font_manager import findfont
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
SHIFTS = (0, -1, 1, -2, 2, -3, 3)  # lines by which a name may be moved to avoid others

GOLDEN_RATIO = 0.618034  # step between hues, which spreads any number of them evenly
FEWEST_COLORS = 12
MOST_NAMED = 60  # instances

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

    Raises:
        InputError: shapes or lengths disagree.
    """
    masks = masks if isinstance(masks, RLEMasks) else torch.as_tensor(masks)
    _check_instances(image, masks, labels)
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


def _check_instances(image: np.ndarray, masks: Tensor | RLEMasks, labels: Sequence) -> None:
    size = masks.image_size if isinstance(masks, RLEMasks) else tuple(masks.shape[1:])
    if image.dtype != np.uint8 or image.shape != (*size, 3) or len(labels) != len(masks):
        raise InputError(
            "expected an image (H, W, 3) uint8 with masks (N, H, W) and N labels, got "
            f"{image.shape} {image.dtype}, {(len(masks), *size)} and {len(labels)}"
        )


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


def _write_names(image: np.ndarray, windows: Sequence[Window], texts: Sequence[str]) -> np.ndarray:
    """Write each text inside its mask, moved up or down to avoid other texts."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(MIN_TEXT, height // TEXT_SHARE)
    font = ImageFont.truetype(findfont("DejaVu Sans"), size)
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
