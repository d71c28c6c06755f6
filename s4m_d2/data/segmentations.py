"""Segmentations of annotations: validation, and conversion to masks of a view.

``lengths`` are the run lengths of a mask in column-major order (COCO), (R,) int64: of background,
of the mask, and so on. They add up to the mask's size; any may be 0.
"""

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

_MAX_REACH = 10  # how far a polygon may extend beyond its image, in longer sides of the image


def read_polygons(polygons: list, image_size: tuple[int, int]) -> tuple[list[np.ndarray], int]:
    """Convert polygons with at least three points to new float64 arrays [x0, y0, x1, ...].

    Args:
        polygons: lists of numbers or of pairs (x, y); or a single one, which some tools write.
        image_size: (H, W).

    Returns:
        The arrays, and the number of other polygons, 0 if there is no array.

    Raises:
        DatasetError: says what is wrong, as part of a sentence.

    >>> for polygons in ([0, 0, 4, 0, 4, 4], [[0, 0], [4, 0], [4, 4]], [[0, 0, 4, 0, 4, 4], [1]]):
    ...     print(read_polygons(polygons, (4, 4)))
    ([array([0., 0., 4., 0., 4., 4.])], 0)
    ([array([0., 0., 4., 0., 4., 4.])], 0)
    ([array([0., 0., 4., 0., 4., 4.])], 1)
    """
    are_pairs = all(isinstance(part, list) and len(part) == 2 for part in polygons)
    is_flat = bool(polygons) and isinstance(polygons[0], int | float)
    parts = [polygons] if is_flat or (are_pairs and len(polygons) >= 3) else polygons
    reach = (_MAX_REACH + 1) * max(image_size)
    arrays = []
    for part in parts:
        try:
            points = np.array(part, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            points = np.array(math.nan)
        is_flat_or_pairs = points.ndim == 1 or (points.ndim and points.shape[-1] == 2)
        low, high = points.min(initial=0), points.max(initial=0)
        if not is_flat_or_pairs or not math.isfinite(high - low):
            raise DatasetError("a polygon must be a list of finite numbers x, y, x, y, ...")
        if low < -reach or high > reach:
            raise DatasetError(
                f"a polygon has the coordinate {low if -low > high else high:g}, far outside the "
                f"image, which has (height, width) {image_size}"
            )
        if points.size >= 6 and points.size % 2 == 0:
            arrays.append(points.reshape(-1))
    return arrays, (len(parts) - len(arrays)) * bool(arrays)


def read_segmentation(
    segmentation: Any, image_size: tuple[int, int]
) -> tuple[list[np.ndarray] | dict, int]:
    """Read polygons as :func:`read_polygons`, or an RLE, alone or in a list, as
    :func:`compressed_rle`; empty: no mask."""
    is_list = isinstance(segmentation, list)
    if is_list and not (len(segmentation) == 1 and isinstance(segmentation[0], dict)):
        return read_polygons(segmentation, image_size)
    rle = segmentation[0] if is_list else segmentation or {}
    is_empty = isinstance(rle, dict) and not rle.get("counts")
    return {} if is_empty else compressed_rle(rle, image_size), 0


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

    COCO's API does not check the text: of a truncated one, the rest of the mask is uninitialized
    memory. Format: digits to the base of 32, least significant first, as characters from "0" on; 32
    is added if more follow, 16 to the last one if the number is negative. From the fourth number
    on, each is the difference to the run before the previous one.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digits = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - ord("0")
    last = np.flatnonzero(digits < 32)
    lengths = np.diff(last, prepend=-1)
    if not len(last) or last[-1] != len(digits) - 1 or lengths.max() > 7:  # 32 bits have 7 digits
        return None
    if digits.min() < 0 or digits.max() > 63:
        return None
    first = last - lengths + 1
    place = np.arange(len(digits)) - np.repeat(first, lengths)
    values = np.add.reduceat((digits % 32) << (5 * place), first)
    values -= (digits[last] >= 16).astype(np.int64) << (5 * lengths)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def compressed_rle(rle: Any, image_size: tuple[int, int]) -> dict:
    """Convert an RLE dict, compressed or not, to one that COCO's API handles: counts are a str.

    Runs of length 0 are removed (the first may be 0): if two masks have such runs at the same
    place, their union by COCO's API is wrong, or does not terminate. Errors: :func:`run_lengths`.
    """
    lengths, counts = run_lengths(rle, image_size), rle["counts"]
    if not isinstance(counts, str) or not lengths[1:].all():
        edges, times = np.unique(lengths.cumsum()[:-1], return_counts=True)
        counts = encode_edges(edges[times % 2 == 1], image_size)["counts"].decode("ascii")
    return {"size": [int(side) for side in image_size], "counts": counts}


def annotation_masks(
    file_name: str,
    annotations: Sequence[dict],
    transforms: T.TransformList,
    image_size: tuple[int, int],
    view_size: tuple[int, int],
) -> Tensor:
    """:func:`transform_masks` of an image's annotations; its DatasetError names the image."""
    segmentations = [row.get("segmentation") for row in annotations]
    try:
        return transform_masks(segmentations, transforms, image_size, view_size)
    except DatasetError as error:
        raise DatasetError(f"Annotations of {file_name}: {error}. Correct or remove it.") from error


def transform_masks(
    segmentations: Sequence[object],
    transforms: T.TransformList,
    image_size: tuple[int, int],
    view_size: tuple[int, int],
) -> Tensor:
    """Transform segmentations of an image to masks in the frame of its view, (N, H', W') bool.

    The points of polygons, [[x0, y0, x1, ...], ...] in px of the image, are transformed and drawn
    in the view; RLE dicts are resampled (nearest pixel). Sizes are (H, W). DatasetError: a
    segmentation is malformed, or of another size than the image.
    """
    masks = np.zeros((len(segmentations), *view_size), dtype=bool)
    pixels = source_pixels(transforms, image_size)
    for segmentation, view in zip(segmentations, masks, strict=True):
        if isinstance(segmentation, list):
            polygons, _ = read_polygons(segmentation, image_size)
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
