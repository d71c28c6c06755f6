"""Pictures of label maps and of SAM's masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_utils

from s4m_d2.errors import InputError
from s4m_d2.sepl.classes import palette
from s4m_d2.sepl.enhancement import BACKGROUND, VOID
from s4m_d2.visualization import instance_colors

LONG_SIDE = 640  # px, of a drawn picture
COLOR_SIDE = 256  # px; at this size it is found which masks touch
WHITE_SHARE = 0.6  # by which an image fades under labels and masks: VOC's colors are dark
FILL_ALPHA = 0.75
CONTOUR_WIDTH = 2  # px
WHITE = 255
STRIPE = 6  # px, half the period of void's stripes
STRIPE_COLORS = (255, 255, 255), (0, 0, 0)
SWATCH_SIZE = 32, 20  # px, width and height
VOID_NAME = "void"


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) at which an image of (height, width) is drawn."""
    scale = LONG_SIDE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_image(image: np.ndarray) -> np.ndarray:
    """An (H, W, 3) uint8 image at the size of the other pictures, its longer side ``LONG_SIDE``."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    shrinks = max(image.shape[:2]) > LONG_SIDE
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, drawn_size(*image.shape[:2]), interpolation=how)


def draw_label(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A label map in VOC's colors over the image, which is gray and faded.

    Args:
        image: (H, W, 3) uint8, RGB.
        label: (H, W) uint8. Background is left free, void is striped.

    Returns:
        (h, w, 3) uint8, the longer side ``LONG_SIDE``.

    Raises:
        InputError: shapes or dtypes disagree.
    """
    if label.shape != image.shape[:2] or label.dtype != np.uint8:
        raise InputError(
            f"label must be {image.shape[:2]} uint8 like the image, got {label.shape} {label.dtype}"
        )
    base = _ground(image)
    label = _resized(label, base)
    drawn = _blend(base, palette()[label])
    free = label == BACKGROUND
    drawn[free] = base[free]
    is_void = label == VOID
    drawn[is_void] = _stripes(label.shape)[is_void]
    for index in np.setdiff1d(label, (BACKGROUND, VOID)):
        _outline(drawn, label == index, palette()[index].tolist())
    return drawn


def draw_masks(image: np.ndarray, masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """SAM's masks over the image: touching ones in different colors, the smaller over the larger.

    Args:
        image: (H, W, 3) uint8, RGB.
        masks: N compressed COCO RLEs of size (H, W).

    Returns:
        (h, w, 3) uint8, the longer side ``LONG_SIDE``.
    """
    drawn = _ground(image)
    base = drawn.copy()
    if not masks:
        return drawn
    colors = instance_colors(_small_masks(masks))
    areas = mask_utils.area(list(masks)).astype(np.int64)
    for number in np.argsort(-areas, kind="stable"):
        mask = _resized(mask_utils.decode(masks[number]), base).astype(bool)
        drawn[mask] = _blend(base[mask], np.array(colors[number], dtype=np.uint8))
        _outline(drawn, mask, colors[number])
    return drawn


def legend_entries(
    labels: Iterable[np.ndarray], names: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
    """Name and (h, w, 3) uint8 swatch of each class that label maps have; void is the last."""
    present = np.zeros(VOID + 1, dtype=bool)
    for label in labels:
        present[label] = True
    present[BACKGROUND] = False
    width, height = SWATCH_SIZE
    entries = []
    for index in np.flatnonzero(present[:VOID]):
        swatch = np.full((height, width, 3), palette()[index], dtype=np.uint8)
        entries.append((names[index], swatch))
    if present[VOID]:
        entries.append((VOID_NAME, _stripes((height, width))))
    return entries


def _ground(image: np.ndarray) -> np.ndarray:
    """The image in light gray, on which colors show."""
    gray = cv2.cvtColor(draw_image(image), cv2.COLOR_RGB2GRAY)
    faded = np.rint(gray * (1 - WHITE_SHARE) + WHITE * WHITE_SHARE).astype(np.uint8)
    return np.repeat(faded[..., None], 3, axis=2)


def _resized(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    size = like.shape[1], like.shape[0]
    return cv2.resize(values, size, interpolation=cv2.INTER_NEAREST_EXACT)


def _blend(base: np.ndarray, colors: np.ndarray) -> np.ndarray:
    return np.rint(base * (1 - FILL_ALPHA) + colors * FILL_ALPHA).astype(np.uint8)


def _stripes(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 with diagonal stripes."""
    y, x = np.ogrid[: size[0], : size[1]]
    return np.array(STRIPE_COLORS, dtype=np.uint8)[(x + y) // STRIPE % 2]


def _outline(drawn: np.ndarray, mask: np.ndarray, color: Sequence[int]) -> None:
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, outlines, -1, color, CONTOUR_WIDTH)


def _small_masks(masks: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """(N, h, w) bool, small enough for any number of masks."""
    height, width = masks[0]["size"]
    stride = -(-max(height, width) // COLOR_SIDE)
    small = np.zeros((len(masks), -(-height // stride), -(-width // stride)), dtype=bool)
    for number, mask in enumerate(masks):
        y, x = mask_utils.decode(mask).nonzero()
        small[number, y // stride, x // stride] = True
    return torch.from_numpy(small)
