"""SEPL as its description reads: loops over masks, classes and pixels, with exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

BACKGROUND, VOID = 0, 255


def literal_enhance(label, masks, o_s_thresh=0.5, o_p_thresh=0.85, keep_uncovered=False):
    """(H, W) pseudo-label and (N, H, W) bool masks -> (H, W), one mask and class at a time."""
    classes = sorted(set(label.flatten().tolist()) - {BACKGROUND, VOID})
    selected = []  # (area, o_s, class, mask)
    for mask in masks:
        best, shared = None, 0
        for index in classes:
            overlap = int(((label == index) & mask).sum())
            if overlap > shared:
                best, shared = index, overlap
        if best is None:
            continue
        o_s = Fraction(shared, int(mask.sum()))
        o_p = Fraction(shared, int((label == best).sum()))
        if o_s > as_fraction(o_s_thresh) or o_p > as_fraction(o_p_thresh):
            selected.append((int(mask.sum()), o_s, best, mask))

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
