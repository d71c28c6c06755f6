"""Which masks of SAM belong to which segment: assignment and selection (arXiv 2305.05803).

A segment is a class of a pseudo-label, or an instance. ``P`` stands for its pixels, ``S`` for those
of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s4m_d2.errors import InputError

O_S_THRESH = 0.5
O_P_THRESH = 0.85
UNASSIGNED = -1


@dataclass(frozen=True)
class Assignment:
    """What became of N masks.

    Attributes:
        segments: (N,) int64, the segment that a mask shares most pixels with, of several the first;
            ``UNASSIGNED`` where it shares none.
        o_s: (N,) float64, |P ∩ S| / |S| of a mask and its segment; 0 where it has none.
        o_p: (N,) float64, |P ∩ S| / |P|.
        selected: (N,) bool.
    """

    segments: Tensor
    o_s: Tensor
    o_p: Tensor
    selected: Tensor


def assign_masks(
    overlaps: Tensor,
    mask_areas: Tensor,
    segment_areas: Tensor,
    *,
    o_s_thresh: float = O_S_THRESH,
    o_p_thresh: float = O_P_THRESH,
) -> Assignment:
    """Assign each mask to the segment it overlaps most; select it if the overlap is large enough.

    Args:
        overlaps: (N, K) integers, |P ∩ S| in pixels.
        mask_areas: (N,) integers, |S|.
        segment_areas: (K,) integers, |P|.
        o_s_thresh: a mask is selected if its ``o_s`` exceeds this,
        o_p_thresh: or its ``o_p`` this. Both in [0, 1]; 1 switches a rule off.

    Raises:
        InputError: a threshold lies outside [0, 1].
    """
    for name, value in (("o_s_thresh", o_s_thresh), ("o_p_thresh", o_p_thresh)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} is {value}; expected a share in [0, 1] (1: never exceeded)")
    if not overlaps.shape[1]:
        zeros = torch.zeros(len(overlaps), dtype=torch.float64, device=overlaps.device)
        none = torch.full_like(zeros, UNASSIGNED, dtype=torch.int64)
        return Assignment(none, zeros, zeros, zeros.bool())
    segments = overlaps.argmax(dim=1)  # of equal ones the first
    shared = overlaps.gather(1, segments[:, None])[:, 0].double()
    o_s = shared / mask_areas.clamp(min=1)
    o_p = shared / segment_areas[segments].clamp(min=1)
    assigned = torch.where(shared > 0, segments, UNASSIGNED)
    return Assignment(assigned, o_s, o_p, (o_s > o_s_thresh) | (o_p > o_p_thresh))
