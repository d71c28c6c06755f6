"""SEPL's rule the straightforward way: a loop over masks and, in it, over classes."""

from __future__ import annotations

import numpy as np

BACKGROUND, VOID = 0, 255


def enhance(
    pseudo_label: np.ndarray,
    masks: np.ndarray,
    o_s_thresh: float = 0.5,
    o_p_thresh: float = 0.85,
) -> np.ndarray:
    """What ``s4m_d2.sepl.enhance`` gives for an (H, W) label and (N, H, W) bool masks."""
    classes = [int(c) for c in np.unique(pseudo_label) if c not in (BACKGROUND, VOID)]
    regions = {c: pseudo_label == c for c in classes}
    claims = []
    for number, mask in enumerate(masks):
        best, most = BACKGROUND, 0
        for c in classes:
            overlap = np.sum(regions[c] & mask)
            if overlap > most:
                best, most = c, overlap
        if best == BACKGROUND:
            continue
        area = np.sum(mask)
        o_s, o_p = most / area, most / np.sum(regions[best])
        if o_s > o_s_thresh or o_p > o_p_thresh:
            claims.append((-area, o_s, -best, number))

    enhanced = np.where(pseudo_label == VOID, pseudo_label, 0).astype(pseudo_label.dtype)
    for _, _, negative, number in sorted(claims):  # the best claim to a pixel is painted last
        enhanced[masks[number]] = -negative
    matched = {-negative for _, _, negative, _ in claims}
    lost = [c for c in classes if c not in matched]
    for c in lost:
        enhanced[regions[c]] = c
    while lost := [c for c in classes if not np.any(enhanced == c)]:
        for c in lost:
            enhanced[regions[c]] = c
    return enhanced
