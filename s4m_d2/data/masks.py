"""Annotations' segmentations as masks of a transformed view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T
from torch import Tensor

from s4m_d2.data.run_lengths import RunLengths
from s4m_d2.data.segmentations import as_polygons, read_mask, read_polygons, read_rle
from s4m_d2.data.transforms import source_pixels
from s4m_d2.errors import DatasetError


def transform_masks(
    segmentations: Sequence[object],
    transforms: T.TransformList,
    image_size: tuple[int, int],
    view_size: tuple[int, int],
) -> Tensor:
    """Segmentations of an image in the frame of its view.

    Polygons move as points and are drawn in the view; masks are resampled (nearest pixel), only
    where they lie if the transforms allow that.

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
    for segmentation, view in zip(segmentations, masks, strict=True):
        if isinstance(segmentation, list):
            polygons = read_polygons(as_polygons(segmentation), image_size)
            _draw_polygons(polygons, transforms, view)
            continue
        mask = read_mask(segmentation, image_size)
        if pixels is None:
            whole = _columns(mask, 0, image_size[1])
            view[:] = transforms.apply_segmentation(whole.astype(np.uint8, order="C"))
        else:
            _resample(mask, *pixels, view)
    return torch.from_numpy(masks)


def tight_boxes(masks: Tensor) -> Tensor:
    """(N, 4) float32 boxes (x0, y0, x1, y1) around (N, H, W) bool masks, of empty ones all 0."""
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks.numpy(), strict=True):
        rows, columns = _bounds(mask)
        box[:] = columns.start, rows.start, columns.stop, rows.stop
    return torch.from_numpy(boxes)


def _draw_polygons(
    polygons: list[np.ndarray], transforms: T.TransformList, view: np.ndarray
) -> None:
    """Set the union of the polygons in an empty (H', W') bool view; parts outside are cut off."""
    if not polygons:
        raise DatasetError("no polygon has three points (x, y) or more")
    moved = [transforms.apply_coords(p.reshape(-1, 2)).reshape(-1) for p in polygons]
    rle = mask_util.merge(mask_util.frPyObjects(moved, *view.shape))
    drawn = read_rle(rle, view.shape)
    rows, columns = drawn.bounds()
    view[rows, columns] = drawn.columns(columns.start, columns.stop)[rows]


def _resample(
    mask: RunLengths | np.ndarray, rows: np.ndarray, columns: np.ndarray, view: np.ndarray
) -> None:
    """``view[:] = mask[rows][:, columns]``, done only where a mask's bounds reach the view.

    Args:
        mask: of (H, W).
        rows, columns: (H',), (W',) monotone indices.
        view: empty (H', W') bool.
    """
    row_bounds, column_bounds = _bounds(mask)
    row_span, column_span = _span(rows, row_bounds), _span(columns, column_bounds)
    rows, columns = rows[row_span], columns[column_span]
    if rows.size and columns.size:
        left = columns.min()
        source = _columns(mask, left, columns.max() + 1)
        view[row_span, column_span] = source[rows].take(columns - left, axis=1)


def _span(indices: np.ndarray, bounds: slice) -> slice:
    """Where monotone indices lie within bounds."""
    inside = np.flatnonzero((indices >= bounds.start) & (indices < bounds.stop))
    return slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0)


def _columns(mask: RunLengths | np.ndarray, start: int, stop: int) -> np.ndarray:
    """(H, stop - start) bool."""
    if isinstance(mask, RunLengths):
        return mask.columns(start, stop)
    return mask[:, start:stop].astype(bool, copy=False)


def _bounds(mask: RunLengths | np.ndarray) -> tuple[slice, slice]:
    """Rows and columns that hold all set pixels; run lengths may give more rows than that."""
    if isinstance(mask, RunLengths):
        return mask.bounds()
    in_rows = np.flatnonzero(mask.any(1))
    if not len(in_rows):
        return slice(0, 0), slice(0, 0)
    rows = slice(in_rows[0], in_rows[-1] + 1)
    columns = np.flatnonzero(mask[rows].any(0))
    return rows, slice(columns[0], columns[-1] + 1)
