"""Annotations' segmentations as masks of a transformed view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T
from torch import Tensor

from s4m_d2.data.segmentations import check_segmentation, read_polygons
from s4m_d2.errors import DatasetError

_MIN_POLYGON_NUMBERS = 6  # three points
_LAYER_CAPACITY = 255  # masks that a uint8 map tells apart, 0 being background


def transform_masks(
    segmentations: Sequence[object],
    transforms: T.TransformList,
    image_size: tuple[int, int],
    view_size: tuple[int, int],
) -> Tensor:
    """Segmentations of an image in the frame of its view.

    Polygons move as points and are drawn in the view; masks are resampled (nearest pixel), those
    that do not overlap together.

    Args:
        segmentations: polygons [[x0, y0, x1, ...], ...] in pixels of the image, RLE dicts
            (compressed or not), or (H, W) arrays.
        transforms: what made the view from the image.
        image_size, view_size: (H, W) before and after.

    Returns:
        (N, H', W') bool.

    Raises:
        DatasetError: a segmentation is malformed, or of another size than the image.
    """
    masks = np.zeros((len(segmentations), *view_size), dtype=bool)
    bitmaps = {}
    for index, segmentation in enumerate(segmentations):
        if isinstance(segmentation, list):
            polygons = read_polygons(segmentation, image_size)
            masks[index] = _draw_polygons(polygons, transforms, view_size)
        else:
            check_segmentation(segmentation, image_size)
            bitmaps[index] = _bitmap(segmentation)
    for layer, members in _pack(bitmaps, image_size):
        moved = np.ascontiguousarray(transforms.apply_segmentation(layer))
        for value in np.flatnonzero(np.bincount(moved.reshape(-1))):
            if value:
                np.equal(moved, value, out=masks[members[value - 1]])
    return torch.from_numpy(masks)


def _draw_polygons(
    polygons: list[np.ndarray], transforms: T.TransformList, view_size: tuple[int, int]
) -> np.ndarray:
    """(H', W') bool: the union of the polygons; parts outside the view are cut off."""
    moved = []
    for points in polygons:
        if len(points) % 2 or len(points) < _MIN_POLYGON_NUMBERS:
            raise DatasetError(
                f"a polygon must have at least three points (x, y), got {len(points)} numbers"
            )
        moved.append(transforms.apply_coords(points.reshape(-1, 2)).reshape(-1))
    rle = mask_util.merge(mask_util.frPyObjects(moved, *view_size))
    return mask_util.decode(rle).astype(bool)


def _bitmap(segmentation: dict | np.ndarray) -> np.ndarray:
    """(H, W) bool from an RLE or an array that fits its image."""
    return _decode(segmentation) if isinstance(segmentation, dict) else segmentation.astype(bool)


def _decode(rle: dict) -> np.ndarray:
    try:
        if isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *rle["size"])
        return mask_util.decode(rle).astype(bool)
    except (ValueError, TypeError) as error:
        raise DatasetError(f"the RLE cannot be decoded ({error})") from error


def _pack(
    bitmaps: dict[int, np.ndarray], image_size: tuple[int, int]
) -> list[tuple[np.ndarray, list[int]]]:
    """Few (H, W) uint8 maps that hold all masks, and the indices that their values 1, 2, ... mean.

    A mask goes into the first map where it covers no other mask, so that resampling a map
    resamples each of its masks exactly as it would be alone.
    """
    layers: list[tuple[np.ndarray, list[int]]] = []
    for index, bitmap in bitmaps.items():
        window = _bounds(bitmap)
        covered = bitmap[window]
        for layer, members in layers:
            if len(members) < _LAYER_CAPACITY and not layer[window][covered].any():
                break
        else:
            layer, members = np.zeros(image_size, dtype=np.uint8), []
            layers.append((layer, members))
        members.append(index)
        layer[window][covered] = len(members)
    return layers


def _bounds(bitmap: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns that hold all set pixels."""
    rows, columns = (np.flatnonzero(bitmap.any(axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
