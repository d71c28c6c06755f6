"""CAM pseudo-labels redrawn by SAM's masks (SEPL, arXiv 2305.05803).

Where the masks of several classes claim a pixel, the paper leaves open what happens. Here:

1. The smallest mask wins: SAM's masks are nested, and the smaller one follows the object more
   closely. Of equally large ones that with the larger ``o_s``, then the smaller class index.
2. A class without a selected mask keeps its pixels of the pseudo-label, whoever claims them.
3. A class that the others would cover completely gets its pixels of the pseudo-label back.

So the result does not depend on the order of the masks, and has every class of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils
from torch import Tensor

from s4m_d2.data.segmentations import compressed_rle, read_rle
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sepl.overlaps import label_overlaps, rle_overlaps
from s4m_d2.sepl.selection import O_P_THRESH, O_S_THRESH, assign_masks

BACKGROUND = 0
VOID = 255

Masks = np.ndarray | Tensor | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class MaskSelection:
    """Which of an image's N masks redraw which of its K classes.

    Attributes:
        classes: (K,) the classes of the pseudo-label, ascending, without background and void.
        mask_classes: (N,) the class that each mask is assigned to; ``BACKGROUND`` where none.
        areas: (N,) int64, pixels of each mask.
        o_s, o_p: (N,) float64 shares of the mask's and of the class's pixels.
        selected: (N,) bool.
    """

    classes: np.ndarray
    mask_classes: np.ndarray
    areas: np.ndarray
    o_s: np.ndarray
    o_p: np.ndarray
    selected: np.ndarray

    @property
    def unmatched_classes(self) -> np.ndarray:
        """Classes without a selected mask: they keep their pseudo-label."""
        return np.setdiff1d(self.classes, self.mask_classes[self.selected])


def enhance(
    pseudo_label: np.ndarray,
    masks: Masks,
    *,
    o_s_thresh: float = O_S_THRESH,
    o_p_thresh: float = O_P_THRESH,
    keep_uncovered: bool = False,
    num_classes: int | None = None,
) -> np.ndarray:
    """Redraw a CAM pseudo-label with SAM's masks of the image.

    Each mask is assigned to the class whose pixels it overlaps most (of equal ones the smaller
    index) and selected if ``o_s = |P ∩ S| / |S| > o_s_thresh`` or
    ``o_p = |P ∩ S| / |P| > o_p_thresh``, P being the pixels of the class and S those of the mask. A
    class becomes the union of its selected masks; without one it stays as it is. How claims of
    several classes to a pixel are settled says the module's docstring.

    Background (0) and void (255) are no classes: neither competes for masks nor stops one, and both
    count in |S|. What a class loses becomes background. Void stays where no class claims it.

    Args:
        pseudo_label: (H, W) integers: 0 background, 255 void, else classes.
        masks: (N, H, W) bool array or tensor, or N COCO RLEs, compressed or not. Any order, and
            they may overlap.
        o_s_thresh, o_p_thresh: in [0, 1]; 1 switches a rule off.
        keep_uncovered: pixels that no mask at all covers keep their label, as in the authors' code;
            in the paper a class with a selected mask loses what lies outside of its masks.
        num_classes: with background; refuse class indices from it on. None: not checked.

    Returns:
        (H, W) of the pseudo-label's dtype, a new array.

    Raises:
        InputError: shapes, dtypes, class indices or thresholds are not as expected.

    Example:
        >>> label = np.array([[0, 3, 0, 0, 7]])
        >>> masks = np.array([[[1, 1, 1, 0, 0]], [[0, 1, 1, 0, 0]]], dtype=bool)
        >>> enhance(label, masks)  # the class 7 has no mask and stays
        array([[3, 3, 3, 0, 7]])
    """
    classes = _classes(pseudo_label, num_classes)
    checked = _checked(masks, pseudo_label.shape)
    selection = _select(pseudo_label, classes, checked, o_s_thresh, o_p_thresh)
    return _merge(pseudo_label, checked, selection, keep_uncovered)


def select_masks(
    pseudo_label: np.ndarray,
    masks: Masks,
    *,
    o_s_thresh: float = O_S_THRESH,
    o_p_thresh: float = O_P_THRESH,
    num_classes: int | None = None,
) -> MaskSelection:
    """The first two steps of :func:`enhance`, with its arguments: assignment and selection."""
    classes = _classes(pseudo_label, num_classes)
    checked = _checked(masks, pseudo_label.shape)
    return _select(pseudo_label, classes, checked, o_s_thresh, o_p_thresh)


def _select(
    pseudo_label: np.ndarray,
    classes: np.ndarray,
    masks: np.ndarray | list[dict],
    o_s_thresh: float,
    o_p_thresh: float,
) -> MaskSelection:
    if isinstance(masks, list):
        overlaps = rle_overlaps(masks, pseudo_label, classes)
        areas = mask_utils.area(masks) if masks else []
    else:
        overlaps = label_overlaps(masks, pseudo_label, classes)
        areas = [np.count_nonzero(mask) for mask in masks]
    class_areas = [np.count_nonzero(pseudo_label == index) for index in classes]
    found = assign_masks(
        torch.from_numpy(overlaps),
        torch.tensor(areas, dtype=torch.int64),
        torch.tensor(class_areas, dtype=torch.int64),
        o_s_thresh=o_s_thresh,
        o_p_thresh=o_p_thresh,
    )
    by_segment = np.append(classes, np.array(BACKGROUND, classes.dtype))  # the last: unassigned
    return MaskSelection(
        classes,
        by_segment[found.segments.numpy()],
        np.array(areas, dtype=np.int64),
        found.o_s.numpy(),
        found.o_p.numpy(),
        found.selected.numpy(),
    )


def merge_masks(
    pseudo_label: np.ndarray,
    masks: Masks,
    selection: MaskSelection,
    *,
    keep_uncovered: bool = False,
) -> np.ndarray:
    """The last step of :func:`enhance`, with its arguments: the selected masks, class by class."""
    _classes(pseudo_label, None)
    checked = _checked(masks, pseudo_label.shape)
    if len(checked) != len(selection.selected):
        raise InputError(
            f"{len(checked)} masks with a selection from {len(selection.selected)}; give the masks "
            "that select_masks was given"
        )
    return _merge(pseudo_label, checked, selection, keep_uncovered)


def _merge(
    pseudo_label: np.ndarray,
    masks: np.ndarray | list[dict],
    selection: MaskSelection,
    keep_uncovered: bool,
) -> np.ndarray:
    kept = pseudo_label == VOID
    if keep_uncovered:
        kept |= ~_union(masks, pseudo_label.shape)
    enhanced = np.where(kept, pseudo_label, np.array(BACKGROUND, pseudo_label.dtype))
    if isinstance(masks, list):
        enhanced = np.asfortranarray(enhanced)  # the order of run lengths
    rows = np.flatnonzero(selection.selected)
    classes = selection.mask_classes[rows].astype(np.int64)
    by_rank = np.lexsort((-classes, selection.o_s[rows], -selection.areas[rows]))
    for row in rows[by_rank]:  # the last one painted wins
        _paint(enhanced, masks[row], selection.mask_classes[row])
    _put_back(enhanced, pseudo_label, selection.unmatched_classes)
    while len(covered := np.setdiff1d(selection.classes, enhanced)):
        _put_back(enhanced, pseudo_label, covered)  # once each: they share no pixels
    return np.ascontiguousarray(enhanced)


def _paint(canvas: np.ndarray, mask: np.ndarray | dict, value: int) -> None:
    """Set the pixels of a mask, in place; where it is an RLE, ``canvas`` is in Fortran order."""
    if isinstance(mask, np.ndarray):
        np.copyto(canvas, value, where=mask)
        return
    lengths = read_rle(mask, canvas.shape).lengths
    of_mask = lengths[1::2]
    starts = lengths.cumsum()[1::2] - of_mask
    places = np.arange(of_mask.sum())
    places += np.repeat(starts - (of_mask.cumsum() - of_mask), of_mask)
    canvas.reshape(-1, order="F")[places] = value


def _put_back(enhanced: np.ndarray, pseudo_label: np.ndarray, classes: np.ndarray) -> None:
    """Give classes the pixels that they have in the pseudo-label, in place."""
    if len(classes):
        np.copyto(enhanced, pseudo_label, where=np.isin(pseudo_label, classes))


def _classes(pseudo_label: np.ndarray, num_classes: int | None) -> np.ndarray:
    """The classes of a pseudo-label, ascending, of its dtype."""
    if not isinstance(pseudo_label, np.ndarray) or pseudo_label.ndim != 2:
        shape = getattr(pseudo_label, "shape", None)
        raise InputError(
            f"pseudo_label must be an (H, W) array of class indices, got "
            f"{type(pseudo_label).__name__} of shape {shape}"
        )
    if pseudo_label.dtype.kind not in "iu":
        raise InputError(
            f"pseudo_label must hold integers, got {pseudo_label.dtype}; of CAM scores take the "
            "class of the highest one first"
        )
    found = np.unique(pseudo_label)
    classes = found[(found != BACKGROUND) & (found != VOID)]
    if len(classes) and classes[0] < 0:
        raise InputError(
            f"pseudo_label has the class index {classes[0]}; expected {BACKGROUND} for background, "
            f"{VOID} for void and positive classes"
        )
    if num_classes is None:
        return classes
    unknown = classes[classes >= num_classes]
    if len(unknown):
        raise InputError(
            f"pseudo_label has class indices {unknown.tolist()}, but there are {num_classes} "
            f"classes, 0..{num_classes - 1} with background. Give the number of classes that the "
            f"labels were made with, and {VOID} where they are unknown."
        )
    return classes


def _checked(masks: Masks, size: tuple[int, int]) -> np.ndarray | list[dict]:
    """(N, H, W) bool array, or list of RLEs, of the given size."""
    if isinstance(masks, Tensor):
        masks = masks.detach().cpu().numpy()
    if isinstance(masks, np.ndarray):
        if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != tuple(size):
            raise InputError(
                f"masks must be (N, {size[0]}, {size[1]}) bool like the pseudo-label, got "
                f"{masks.shape} {masks.dtype}"
            )
        return masks
    return [_compressed(mask, number, size) for number, mask in enumerate(masks)]


def _compressed(mask: Mapping[str, Any], number: int, size: tuple[int, int]) -> dict:
    if not isinstance(mask, Mapping):
        raise InputError(
            f"mask {number} is of type {type(mask).__name__}; expected a COCO RLE, a dict with "
            "size and counts, or give all masks as one (N, H, W) bool array"
        )
    try:
        return compressed_rle(dict(mask), size)
    except DatasetError as error:
        raise InputError(f"mask {number}: {error}") from error


def _union(masks: np.ndarray | list[dict], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: pixels of any mask."""
    covered = np.zeros(size, dtype=bool, order="F")
    for mask in masks:
        _paint(covered, mask, True)
    return covered
