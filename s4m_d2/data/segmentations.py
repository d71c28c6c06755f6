"""Segmentations of annotations: validation, and conversion to masks of a view.

A mask is read as its run lengths in column-major order (COCO), (R,) int64: of a background run, a
run of the mask, and so on. They add up to the mask's size; any may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from pycocotools import mask as mask_utils
from torch import Tensor

from s4m_d2.data.transforms import source_pixels
from s4m_d2.errors import DatasetError
from s4m_d2.structures import encode_edges

_PAIR, _FEWEST_POINTS = 2, 3
_MAX_REACH = 10  # how far a polygon may extend beyond its image, in longer sides of the image
_NO_NUMBERS = "a polygon must be a list of finite numbers x, y, x, y, ..."
# Of a compressed RLE's text: see _read_text.
_TEXT_ZERO = ord("0")
_TEXT_BITS = 5
_TEXT_MORE = 1 << _TEXT_BITS
_TEXT_MAX_DIGITS = 7  # of a 32-bit number


def as_polygons(segmentation: list) -> list:
    """Make a list of polygons; tools also write a single polygon, flat or as pairs.

    >>> as_polygons([0, 0, 4, 0, 4, 4]), as_polygons([[0, 0], [4, 0], [4, 4]])
    ([[0, 0, 4, 0, 4, 4]], [[[0, 0], [4, 0], [4, 4]]])
    """
    pairs = (isinstance(part, list) and len(part) == _PAIR for part in segmentation)
    is_one = bool(segmentation) and (
        isinstance(segmentation[0], int | float)
        or (len(segmentation) >= _FEWEST_POINTS and all(pairs))
    )
    return [segmentation] if is_one else segmentation


def read_polygons(polygons: list, image_size: tuple[int, int]) -> list[np.ndarray]:
    """Convert polygons with at least three points to new float64 arrays [x0, y0, x1, ...].

    Args:
        polygons: lists of numbers or of pairs (x, y), such as :func:`as_polygons` returns.
        image_size: (H, W).

    Raises:
        DatasetError: says what is wrong, as part of a sentence.
    """
    reach = (_MAX_REACH + 1) * max(image_size)
    arrays = []
    for polygon in polygons:
        try:
            points = np.array(polygon, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise DatasetError(_NO_NUMBERS) from error
        is_flat_or_pairs = points.ndim == 1 or (points.ndim and points.shape[-1] == _PAIR)
        low, high = points.min(initial=0), points.max(initial=0)
        if not is_flat_or_pairs or not math.isfinite(high - low):
            raise DatasetError(_NO_NUMBERS)
        if low < -reach or high > reach:
            raise DatasetError(
                f"a polygon has the coordinate {low if -low > high else high:g}, far outside the "
                f"image, which has (height, width) {image_size}"
            )
        if points.size >= _FEWEST_POINTS * _PAIR and points.size % _PAIR == 0:
            arrays.append(points.reshape(-1))
    return arrays


def read_segmentation(
    segmentation: Any, image_size: tuple[int, int]
) -> tuple[list[np.ndarray] | dict, int]:
    """Read polygons, or an RLE, alone or in a list; empty: no mask.

    Returns:
        as :func:`read_polygons` or :func:`compressed_rle`, which raise the errors; the number of
        polygons that were left out beside others.
    """
    parts = as_polygons(segmentation) if isinstance(segmentation, list) else [segmentation or {}]
    if len(parts) == 1 and isinstance(parts[0], dict):
        return compressed_rle(parts[0], image_size) if parts[0].get("counts") else {}, 0
    if not isinstance(segmentation, list):
        raise DatasetError("expected polygons or an RLE")
    polygons = read_polygons(parts, image_size)
    return polygons, (len(parts) - len(polygons)) * bool(polygons)


def run_lengths(segmentation: object, image_size: tuple[int, int]) -> np.ndarray:
    """Read an RLE dict, compressed or not.

    Raises:
        DatasetError: says what is wrong, as part of a sentence.
    """
    if not isinstance(segmentation, dict):
        kind = type(segmentation).__name__
        raise DatasetError(f"the segmentation is of type {kind}; expected polygons or an RLE dict")
    if not {"size", "counts"} <= segmentation.keys():
        raise DatasetError("an RLE needs the keys 'size' and 'counts'")
    size, counts = segmentation["size"], segmentation["counts"]
    if not np.iterable(size) or tuple(size) != image_size:
        raise DatasetError(f"the mask has (height, width) {size}, but the image has {image_size}")
    if isinstance(counts, str | bytes):
        lengths = _read_text(counts)
    else:
        whole = isinstance(counts, list) and all(isinstance(n, Integral) for n in counts)
        lengths = np.array(counts, dtype=object) if whole else None  # of any size
    if lengths is None or (lengths < 0).any():
        raise DatasetError(
            "an RLE's counts must be COCO's text or a list of whole numbers from 0 on"
        )
    area = image_size[0] * image_size[1]
    if lengths.sum() != area:
        raise DatasetError(
            f"an RLE's counts sum to {lengths.sum()}; expected height * width, {area}"
        )
    return lengths.astype(np.int64)


def _read_text(text: str | bytes) -> np.ndarray | None:
    """Decode the run lengths of a compressed RLE; None: malformed.

    COCO's API does not check the text: if it is truncated, the rest of the mask is uninitialized
    memory. Format: digits to the base of 32, least significant first, as characters from "0" on; 32
    added to a digit means that more follow, 16 in the last one that the number is negative. From
    the fourth number on, each is the difference to the run before the previous one.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digits = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - _TEXT_ZERO
    last = np.flatnonzero(digits < _TEXT_MORE)
    lengths = np.diff(last, prepend=-1)
    if (
        not len(last)
        or last[-1] != len(digits) - 1
        or lengths.max() > _TEXT_MAX_DIGITS
        or digits.min() < 0
        or digits.max() >= 2 * _TEXT_MORE
    ):
        return None
    first = last - lengths + 1
    place = np.arange(len(digits)) - np.repeat(first, lengths)
    values = np.add.reduceat((digits % _TEXT_MORE) << (_TEXT_BITS * place), first)
    values -= (digits[last] >= _TEXT_MORE // 2).astype(np.int64) << (_TEXT_BITS * lengths)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def compressed_rle(rle: dict, image_size: tuple[int, int]) -> dict:
    """Convert an RLE dict, compressed or not, to one that COCO's API handles: counts are a str.

    Runs of length 0 are removed (the first may be 0): if two masks have such runs at the same
    place, their union by COCO's API is wrong, or does not terminate.

    Raises:
        DatasetError: says what is wrong, as part of a sentence.
    """
    lengths, counts = run_lengths(rle, image_size), rle["counts"]
    if not isinstance(counts, str) or not lengths[1:].all():
        edges, times = np.unique(lengths.cumsum()[:-1], return_counts=True)
        counts = encode_edges(edges[times % 2 == 1], image_size)["counts"].decode("ascii")
    return {"size": [int(side) for side in image_size], "counts": counts}


def transform_masks(
    segmentations: Sequence[object],
    transforms: T.TransformList,
    image_size: tuple[int, int],
    view_size: tuple[int, int],
) -> Tensor:
    """Transform segmentations of an image to masks in the frame of its view.

    The points of polygons are transformed and drawn in the view, where parts outside are cut off;
    masks are resampled (nearest pixel).

    Args:
        segmentations: polygons [[x0, y0, x1, ...], ...] in pixels of the image, or RLE dicts
            (compressed or not).
        transforms: from the image to the view.
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
            if not polygons:
                raise DatasetError("no polygon has three points (x, y) or more")
            moved = [transforms.apply_coords(p.reshape(-1, 2)).reshape(-1) for p in polygons]
            rle = mask_utils.merge(mask_utils.frPyObjects(moved, *view_size))
            lengths = run_lengths(rle, view_size)
            rows, columns = _bounds(lengths, view_size[0])
            view[rows, columns] = _decode(lengths, view_size[0], columns)[rows]
            continue
        lengths = run_lengths(segmentation, image_size)
        if pixels is None:
            whole = _decode(lengths, image_size[0], slice(0, image_size[1]))
            view[:] = transforms.apply_segmentation(whole.astype(np.uint8, order="C"))
        else:
            _resample(lengths, image_size[0], *pixels, view)
    return torch.from_numpy(masks)


def _bounds(lengths: np.ndarray, height: int) -> tuple[slice, slice]:
    """Rows and columns that contain all set pixels; the rows may be larger than needed."""
    runs, ends = lengths[1::2], lengths.cumsum()[1::2]
    first, last = (ends - runs)[runs > 0], ends[runs > 0] - 1
    if not len(first):
        return slice(0, 0), slice(0, 0)
    left, right = first // height, last // height
    columns = slice(int(left[0]), int(right[-1]) + 1)
    if (left != right).any():  # a run goes on in the next column, from its top
        return slice(0, height), columns
    return slice(int((first % height).min()), int((last % height).max()) + 1), columns


def _decode(lengths: np.ndarray, height: int, columns: slice) -> np.ndarray:
    """(H, columns) bool: these columns of a mask."""
    start, stop = columns.start * height, columns.stop * height
    edges = lengths.cumsum().clip(start, stop)
    is_set = np.arange(len(edges)) % 2 == 1
    return np.repeat(is_set, np.diff(edges, prepend=start)).reshape(-1, height).T


def _resample(
    lengths: np.ndarray, height: int, rows: np.ndarray, columns: np.ndarray, view: np.ndarray
) -> None:
    """``view[:] = mask[rows][:, columns]`` of an empty view, inside the mask's bounds alone."""
    spans = []
    for indices, bounds in zip((rows, columns), _bounds(lengths, height), strict=True):
        inside = np.flatnonzero((indices >= bounds.start) & (indices < bounds.stop))
        if not inside.size:
            return
        spans.append(slice(inside[0], inside[-1] + 1))  # as the indices are monotone
    rows, columns = rows[spans[0]], columns[spans[1]]
    left = columns.min()
    source = _decode(lengths, height, slice(left, columns.max() + 1))
    view[spans[0], spans[1]] = source[rows].take(columns - left, axis=1)


def boxes_meet(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes, XYWH, share an area."""
    return all(
        max(one[i], other[i]) < min(one[i] + one[i + 2], other[i] + other[i + 2]) for i in (0, 1)
    )
