"""SEPL's rule: SAM's masks are assigned to segments, selected and merged (arXiv 2305.05803).

A segment is a class of a pseudo-label, or an instance; ``P`` are its pixels, ``S`` those of a mask.
The paper does not define which class gets a pixel covered by masks of several classes. Here:

1. The smallest mask wins: SAM's masks are nested, and the smaller one is more accurate. Of equally
   large ones that with the larger ``o_s``, then the smaller class index.
2. A class without a selected mask keeps its pixels of the pseudo-label.
3. A class that the others would cover completely gets its pixels of the pseudo-label back.

So the result does not depend on the order of the masks, and contains every class of the input.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor

from s4m_d2.data.segmentations import compressed_rle
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.structures import encode_masks

BACKGROUND, VOID = 0, 255
O_S_THRESH, O_P_THRESH = 0.5, 0.85

Masks = np.ndarray | Tensor | Sequence[dict[str, Any]]


def assign_masks(
    overlaps: Tensor,
    mask_areas: Tensor,
    segment_areas: Tensor,
    *,
    o_s_thresh: float = O_S_THRESH,
    o_p_thresh: float = O_P_THRESH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign each mask to the segment it overlaps most; select it if the overlap is large enough.

    Args:
        overlaps: (N, K) integers, |P ∩ S| in pixels, K >= 1.
        mask_areas, segment_areas: (N,) and (K,) integers, |S| and |P|.
        o_s_thresh: a mask is selected if ``o_s = |P ∩ S| / |S|`` exceeds this,
        o_p_thresh: or ``o_p = |P ∩ S| / |P|`` this. InputError: one is not in [0, 1].

    Returns:
        (N,) int64 segments (of equal overlaps the first); (N,) float64 ``o_s``; (N,) bool, whether
        the mask is selected (never without a shared pixel).
    """
    for name, value in (("o_s_thresh", o_s_thresh), ("o_p_thresh", o_p_thresh)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} is {value}; expected a share in [0, 1] (1: never exceeded)")
    segments = overlaps.argmax(dim=1)
    shared = overlaps.gather(1, segments[:, None])[:, 0].double()
    o_s = shared / mask_areas.clamp(min=1)
    o_p = shared / segment_areas[segments].clamp(min=1)
    return segments, o_s, (o_s > o_s_thresh) | (o_p > o_p_thresh)


def enhance(
    pseudo_label: np.ndarray,
    masks: Masks,
    *,
    o_s_thresh: float = O_S_THRESH,
    o_p_thresh: float = O_P_THRESH,
    keep_uncovered: bool = False,
) -> np.ndarray:
    """Enhance a CAM pseudo-label with SAM's masks of the image.

    A class becomes the union of its masks by :func:`assign_masks`; without one it does not change.
    Background and void are not classes: no mask is assigned to them, but both count in |S|. Pixels
    that a class loses become background; void remains unless covered.

    Args:
        pseudo_label: (H, W) integers: 0 background, 255 void, else classes.
        masks: (N, H, W) bool array or tensor, N COCO RLEs, or SAM's records; they may overlap.
        o_s_thresh, o_p_thresh: in [0, 1]; 1 switches a rule off.
        keep_uncovered: pixels that no mask covers keep their label (the authors' variant).

    Returns:
        (H, W) of the pseudo-label's dtype, a new array.

    Raises:
        InputError: shapes, dtypes, class indices or thresholds are not as expected.
        DatasetError: a mask is not an RLE, damaged or of another size.

    Example:
        >>> label = np.array([[0, 3, 0, 0, 7]])
        >>> masks = np.array([[[1, 1, 1, 0, 0]], [[0, 1, 1, 0, 0]]], dtype=bool)
        >>> enhance(label, masks)  # the class 7 has no mask and keeps its pixels
        array([[3, 3, 3, 0, 7]])
    """
    classes = _classes(pseudo_label)
    rles = _encoded(masks, pseudo_label.shape)
    if not len(classes) or not rles:
        return pseudo_label.copy()
    overlaps, areas, class_areas = _overlaps(rles, pseudo_label, classes)
    options = {"o_s_thresh": o_s_thresh, "o_p_thresh": o_p_thresh}
    owners, o_s, selected = map(np.asarray, assign_masks(overlaps, areas, class_areas, **options))
    uncovered = ~mask_utils.decode(mask_utils.merge(rles)).view(bool) if keep_uncovered else False
    enhanced = pseudo_label * ((pseudo_label == VOID) | uncovered)
    order = np.lexsort((-owners, o_s, -areas.numpy()))  # the winner is last
    for row in order[selected[order]]:
        np.copyto(enhanced, classes[owners[row]], where=mask_utils.decode(rles[row]).view(bool))
    lost = np.delete(classes, owners[selected])  # those without a selected mask
    np.copyto(enhanced, pseudo_label, where=np.isin(pseudo_label, lost))
    while len(lost := np.setdiff1d(classes, enhanced)):  # covered; once each, as none overlap
        np.copyto(enhanced, pseudo_label, where=np.isin(pseudo_label, lost))
    return enhanced


def _overlaps(
    rles: list[dict[str, Any]], label: np.ndarray, classes: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels as int64: (N, K) of masks and classes, (N,) of masks, (K,) of classes."""
    by_column = np.asfortranarray(label)  # the order of run lengths
    segments = [mask_utils.encode((by_column == c).view(np.uint8)) for c in classes]
    areas, class_areas = (mask_utils.area(of).astype(np.int64) for of in (rles, segments))
    # Of a crowd, COCO's IoU is the share of the first mask's area.
    shares = mask_utils.iou(rles, segments, [True] * len(segments))
    overlaps = np.rint(shares * areas[:, None]).astype(np.int64)
    return torch.from_numpy(overlaps), torch.from_numpy(areas), torch.from_numpy(class_areas)


def checked_rles(masks: Sequence[Any], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Convert COCO RLEs of (H, W), compressed or not, or the ``segmentation`` of SAM's records,
    which may be an (H, W) bool array, to compressed ones with counts of type str.

    DatasetError: names a mask that is neither, damaged or of another size.
    """
    rles = []
    for number, mask in enumerate(masks):
        try:
            rle = mask.get("segmentation", mask) if isinstance(mask, dict) else mask
            if isinstance(rle, np.ndarray) and (rle.shape, rle.dtype) == (size, bool):
                rles += encode_masks(torch.from_numpy(rle)[None])
            else:
                rles.append(compressed_rle(rle, size))
        except DatasetError as error:
            raise DatasetError(f"mask {number} of {len(masks)}: {error}") from error
    return rles


def _encoded(masks: Masks, size: tuple[int, ...]) -> list[dict[str, Any]]:
    if not isinstance(masks, Tensor | np.ndarray):
        return checked_rles(masks, (size[0], size[1]))
    masks = masks if isinstance(masks, Tensor) else torch.tensor(masks)
    if masks.dtype != torch.bool or masks.ndim != 3 or masks.shape[1:] != size:
        raise InputError(
            f"masks must be (N, {size[0]}, {size[1]}) bool like the pseudo-label, got "
            f"{tuple(masks.shape)} {masks.dtype}"
        )
    return encode_masks(masks)


def _classes(pseudo_label: np.ndarray) -> np.ndarray:
    is_map = isinstance(pseudo_label, np.ndarray) and pseudo_label.ndim == 2
    if is_map and pseudo_label.dtype.kind in "iu" and pseudo_label.min(initial=0) >= 0:
        return np.setdiff1d(pseudo_label, (BACKGROUND, VOID))
    found = type(pseudo_label).__name__, np.shape(pseudo_label), getattr(pseudo_label, "dtype", "")
    raise InputError(
        f"pseudo_label must be an (H, W) array of integers from 0 on ({BACKGROUND} is background, "
        f"{VOID} void), got {' '.join(map(str, found))}; of CAM scores take the class of the "
        "highest one first"
    )
