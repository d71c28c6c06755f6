"""Pictures of instances."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_segmentation_masks

from s4m_d2.errors import InputError, printable

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
TOUCH_SIDE = 256  # px; masks are compared at about this size
TOUCH_KERNEL = 5  # px at that size: a gap up to this counts as touching


def overlay(
    image: np.ndarray,
    masks: np.ndarray | Tensor,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    scale: int | None = None,
) -> np.ndarray:
    """Draw instances on an image: filled, outlined and named, touching ones in different colors.

    Args:
        image: (H, W, 3) uint8, RGB.
        masks: (N, H, W) bool.
        labels: N indices into ``class_names``.
        class_names: names.
        scores: N numbers in [0, 1], written as percentages; None: not written.
        scale: integer factor by which the picture is enlarged; None: so that names are readable.

    Returns:
        (scale·H, scale·W, 3) uint8.

    Raises:
        InputError: shapes, dtypes or lengths disagree.
    """
    masks = torch.as_tensor(masks)
    _check_instances(image, masks, labels, scores)
    scale = scale or readable_scale(image)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    if not len(masks):
        return image
    colors = instance_colors(masks)
    enlarged = masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    canvas = torch.from_numpy(image).permute(2, 0, 1)
    visible = _smallest_on_top(enlarged)  # torchvision paints what masks share black
    filled = draw_segmentation_masks(canvas, visible, alpha=FILL_ALPHA, colors=colors)
    drawn = np.ascontiguousarray(filled.permute(1, 2, 0).numpy())
    bitmaps: np.ndarray = enlarged.numpy().astype(np.uint8)
    for mask, color in zip(bitmaps, colors, strict=True):
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, color, CONTOUR_WIDTH)
    texts = [printable(class_names[label], MOST_LETTERS) for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}" for text, score in zip(texts, scores, strict=True)]
    return _write_names(drawn, enlarged.numpy(), texts)


def readable_scale(image: np.ndarray) -> int:
    """The factor by which an (H, W, 3) picture is enlarged, so that names are readable."""
    return -(-READABLE_SIDE // min(image.shape[:2]))


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) farthest inside an (H, W) bool mask."""
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def _check_instances(image: np.ndarray, masks: Tensor, labels: Sequence, scores: Sequence | None):
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if masks.dtype != torch.bool or tuple(masks.shape[1:]) != image.shape[:2]:
        raise InputError(
            f"masks must be (N, {image.shape[0]}, {image.shape[1]}) bool like the image, "
            f"got {tuple(masks.shape)} {masks.dtype}"
        )
    if len(labels) != len(masks) or (scores is not None and len(scores) != len(masks)):
        raise InputError(f"{len(masks)} masks need as many labels and scores")


def _smallest_on_top(masks: Tensor) -> Tensor:
    """(N, H, W) bool masks without overlaps: a pixel goes to the smallest that covers it."""
    areas = masks.flatten(1).sum(1)
    cost = torch.where(masks, areas[:, None, None], masks[0].numel() + 1)
    owner = cost.argmin(0)
    return masks & (owner == torch.arange(len(masks))[:, None, None])


def instance_colors(masks: Tensor) -> list[tuple[int, int, int]]:
    """An RGB color for each of N masks (N, H, W) bool; touching masks have different ones.

    The same masks always get the same colors.
    """
    touching = _touching(masks)
    most = int(touching.sum(1).max()) + 1 if len(masks) else 0
    palette = _palette(max(FEWEST_COLORS, most))
    chosen: list[int] = []
    for i in range(len(masks)):
        taken = {chosen[j] for j in range(i) if touching[i, j]}
        order = [(i + step) % len(palette) for step in range(len(palette))]
        chosen.append(next(color for color in order if color not in taken))
    return [palette[color] for color in chosen]


def _touching(masks: Tensor) -> Tensor:
    """(N, N) bool: masks that overlap or nearly so; no mask touches itself."""
    stride = max(1, max(masks.shape[1:]) // TOUCH_SIDE)
    coarse = F.max_pool2d(masks[:, None].float(), stride, ceil_mode=True)
    grown = F.max_pool2d(coarse, TOUCH_KERNEL, stride=1, padding=TOUCH_KERNEL // 2)
    touching = grown.flatten(1) @ coarse.flatten(1).T > 0
    return (touching | touching.T).fill_diagonal_(False)


def _palette(count: int) -> list[tuple[int, int, int]]:
    """Saturated colors; neighbors in the list have distant hues and another brightness."""
    colors = []
    for i in range(count):
        value = 1.0 if i % 2 else 0.8
        rgb = colorsys.hsv_to_rgb(i * GOLDEN_RATIO % 1, 0.9, value)
        red, green, blue = (round(255 * channel) for channel in rgb)
        colors.append((red, green, blue))
    return colors


def _write_names(image: np.ndarray, masks: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Write each text inside its mask, or as near above or below as other texts let it."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(MIN_TEXT, height // TEXT_SHARE)
    font = ImageFont.load_default(size)
    written: list[tuple[float, float, float]] = []  # center and half the width of each text
    for i in np.argsort(-masks.sum((1, 2)), kind="stable"):
        if not masks[i].any():
            continue
        center_x, center_y = deepest_point(masks[i])
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
