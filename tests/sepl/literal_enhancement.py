"""SEPL as its description reads: loops over masks, classes and pixels, with exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

BACKGROUND, VOID = 0, 255


def literal_selection(segments, masks, o_s_thresh, o_p_thresh):
    """(mask, index of its segment, o_s) of each selected mask; all (N, H, W) bool."""
    selected = []
    for mask in masks:
        shared = [int((segment & mask).sum()) for segment in segments]
        if not any(shared):
            continue
        best = shared.index(max(shared))  # the first of several
        o_s = Fraction(shared[best], int(mask.sum()))
        o_p = Fraction(shared[best], int(segments[best].sum()))
        if o_s > as_fraction(o_s_thresh) or o_p > as_fraction(o_p_thresh):
            selected.append((mask, best, o_s))
    return selected


def literal_enhance(label, masks, o_s_thresh=0.5, o_p_thresh=0.85, keep_uncovered=False):
    """(H, W) pseudo-label and (N, H, W) bool masks -> (H, W), one mask and class at a time."""
    classes = sorted(set(label.flatten().tolist()) - {BACKGROUND, VOID})
    segments = [label == index for index in classes]
    found = literal_selection(segments, masks, o_s_thresh, o_p_thresh)
    selected = [(int(mask.sum()), o_s, classes[best], mask) for mask, best, o_s in found]

    result = np.zeros_like(label)
    for place in np.ndindex(label.shape):
        claims = [(area, -o_s, index) for area, o_s, index, mask in selected if mask[place]]
        is_covered = any(mask[place] for mask in masks)
        if claims:
            result[place] = min(claims)[2]
        elif label[place] == VOID or (keep_uncovered and not is_covered):
            result[place] = label[place]
    with_masks = {index for _, _, index, _ in selected}
    for index in set(classes) - with_masks:
        result[label == index] = index
    while lost := [index for index in classes if not (result == index).any()]:
        for index in lost:
            result[label == index] = index
    return result


def as_fraction(value: float) -> Fraction:
    """What a decimal number stands for: 0.85 is 17/20."""
    return Fraction(str(value))
