"""Masks as polygons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from s4m_d2.structures import decode_window


def mask_polygons(rle: Mapping[str, Any]) -> list[np.ndarray]:
    """Outlines of a mask's pieces, without their holes, largest first.

    Args:
        rle: COCO's of an image.

    Returns:
        (K, 2) float64 corners (x, y) each, K >= 4, in px of the image: a quarter of a pixel inside
        the pixels' edges, where COCO's API draws exactly the piece.
    """
    window, x, y = decode_window(rle)
    enlarged = window.repeat(2, axis=0).repeat(2, axis=1)
    found, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = [(piece[:, 0] + 0.5) / 2 + (x, y) for piece in found]
    return sorted(corners, key=lambda piece: -cv2.contourArea(piece.astype(np.float32)))


def are_exact(polygons: list[np.ndarray], rle: Mapping[str, Any]) -> bool:
    """Whether COCO's API draws the mask from these polygons: not one with holes."""
    drawn = mask_util.frPyObjects([piece.ravel().tolist() for piece in polygons], *rle["size"])
    return bool(mask_util.iou([mask_util.merge(drawn)], [rle], [0])[0, 0] == 1.0)
