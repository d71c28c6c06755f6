"""Annotations' segmentations as masks of a transformed view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T
from torch import Tensor

from s4m_d2.data.cropping import source_pixels
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
    pixels = source_pixels(transforms, image_size)
    bitmaps = {}
    for index, segmentation in enumerate(segmentations):
        if isinstance(segmentation, list):
            polygons = read_polygons(segmentation, image_size)
            _draw_polygons(polygons, transforms, masks[index])
            continue
        check_segmentation(segmentation, image_size)
        if isinstance(segmentation, dict):
            segmentation = _compressed(segmentation)
        if pixels is None:
            bitmaps[index] = _bitmap(segmentation)
        else:
            _resample(segmentation, *pixels, masks[index])
    for layer, members in _pack(bitmaps, image_size):
        moved = np.ascontiguousarray(transforms.apply_segmentation(layer))
        for value in np.flatnonzero(np.bincount(moved.reshape(-1))):
            if value:
                np.equal(moved, value, out=masks[members[value - 1]])
    return torch.from_numpy(masks)


def _draw_polygons(
    polygons: list[np.ndarray], transforms: T.TransformList, view: np.ndarray
) -> None:
    """Set the union of the polygons in an empty (H', W') bool view; parts outside are cut off."""
    moved = []
    for points in polygons:
        if len(points) % 2 or len(points) < _MIN_POLYGON_NUMBERS:
            raise DatasetError(
                f"a polygon must have at least three points (x, y), got {len(points)} numbers"
            )
        moved.append(transforms.apply_coords(points.reshape(-1, 2)).reshape(-1))
    rle = mask_util.merge(mask_util.frPyObjects(moved, *view.shape))
    window = _bounds(rle)
    if view[window].size:
        view[window] = mask_util.decode(rle)[window]


def _resample(
    segmentation: dict | np.ndarray, rows: np.ndarray, columns: np.ndarray, view: np.ndarray
) -> None:
    """``view[:] = mask[rows][:, columns]``, done only where a mask's bounds reach the view.

    Args:
        segmentation: compressed RLE, or (H, W) array.
        rows, columns: (H',), (W',) monotone indices.
        view: empty (H', W') bool.
    """
    spans = [
        _span(indices, bounds)
        for indices, bounds in zip((rows, columns), _bounds(segmentation), strict=True)
    ]
    rows, columns = rows[spans[0]], columns[spans[1]]
    if not rows.size or not columns.size:
        return
    top, left = rows.min(), columns.min()
    source = _bitmap(segmentation)[top : rows.max() + 1, left : columns.max() + 1]
    view[tuple(spans)] = source.take(columns - left, axis=1).take(rows - top, axis=0)


def _span(indices: np.ndarray, bounds: slice) -> slice:
    """Where monotone indices lie within bounds."""
    inside = np.flatnonzero((indices >= bounds.start) & (indices < bounds.stop))
    return slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0)


def _compressed(rle: dict) -> dict:
    try:
        plain = isinstance(rle["counts"], list)
        return mask_util.frPyObjects(rle, *rle["size"]) if plain else rle
    except (ValueError, TypeError) as error:
        raise _undecodable(error) from error


def _bitmap(segmentation: dict | np.ndarray) -> np.ndarray:
    """(H, W) bool from a compressed RLE or an array that fits its image."""
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(bool, copy=False)
    try:
        return mask_util.decode(segmentation).view(bool)
    except (ValueError, TypeError) as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> DatasetError:
    return DatasetError(f"the RLE cannot be decoded ({error})")


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


def _bounds(segmentation: dict | np.ndarray) -> tuple[slice, slice]:
    """Rows and columns that hold all set pixels; of an RLE they may be more than that."""
    if isinstance(segmentation, dict):
        height, width = segmentation["size"]
        x, y, reach_x, reach_y = (int(value) for value in mask_util.toBbox(segmentation))
        return slice(y, min(y + reach_y, height)), slice(x, min(x + reach_x, width))
    rows, columns = (np.flatnonzero(segmentation.any(axis)) for axis in (1, 0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
