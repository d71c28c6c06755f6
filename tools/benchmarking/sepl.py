"""SEPL's enhancement of one pseudo-label, of dense masks and of RLEs, beside a double loop."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from benchmarking.measuring import checked
from benchmarking.timing import Clock, Form, ratio, summarize
from s4m_d2.engine.rng import derive_seed
from s4m_d2.sepl import BACKGROUND, VOID, enhance
from s4m_d2.structures import encode_masks

SIZE = (500, 500)  # an image of VOC
CLASSES = 20
PARTS = 5  # masks inside each object, beside the one of the whole
PAIRS, STUFF = 15, 15  # masks of two objects together, and of what lies between the objects
RADII = (25.0, 110.0)  # px
PART_SCALE = (0.15, 0.6)  # of the object's radius
ROUGHNESS = 0.35  # of a border, in radii
PLAIN, DENSE, RLE = "double loop", "dense masks", "RLEs"


class Scene(NamedTuple):
    """A CAM-like label (H, W) uint8 and masks (N, H, W) bool, largest first, as of SAM."""

    label: np.ndarray
    masks: np.ndarray


def scene(size: tuple[int, int] = SIZE, classes: int = CLASSES) -> Scene:
    """Irregular objects of all sizes that overlap, one a class; nested and joined masks of them.

    The label has a smaller, displaced blob of each object, with void along its border.
    """
    draws = np.random.default_rng(derive_seed("benchmark", "sepl"))
    low, high = np.log(np.array(RADII) * min(size) / min(SIZE))
    radii = np.exp(np.linspace(high, low, classes))
    centers = draws.uniform(0.1, 0.9, (classes, 2)) * size
    label = np.zeros(size, dtype=np.uint8)
    objects, masks = [], []
    for number, (center, radius) in enumerate(zip(centers, radii, strict=True), start=1):
        whole = _blob(center, radius, size, draws)
        objects.append(whole)
        label[_blob(center + draws.normal(0, 0.2 * radius, 2), 0.8 * radius, size, draws)] = number
        for scale in draws.uniform(*PART_SCALE, PARTS):
            inside = np.argwhere(whole)
            masks.append(whole & _blob(draws.choice(inside), scale * radius, size, draws))
    masks += objects
    for one, other in draws.integers(0, classes, (PAIRS, 2)):
        masks.append(objects[one] | objects[other])
    free = ~np.any(objects, axis=0)
    for center in draws.uniform(0, 1, (STUFF, 2)) * size:
        masks.append(free & _blob(center, 2 * np.exp(high), size, draws))
    edge = cv2.morphologyEx(label, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    label[edge] = VOID
    return Scene(label, np.array(sorted(masks, key=np.count_nonzero, reverse=True)))


def _blob(
    center: np.ndarray, radius: float, size: tuple[int, int], draws: np.random.Generator
) -> np.ndarray:
    """(H, W) bool: an ellipse with a rough border around ``center`` (y, x)."""
    rough = cv2.resize(draws.normal(size=(16, 16)), size[::-1], interpolation=cv2.INTER_CUBIC)
    stretch = draws.uniform(0.7, 1.4)
    y, x = np.ogrid[: size[0], : size[1]]
    distance = np.hypot((y - center[0]) / stretch, (x - center[1]) * stretch) / radius
    return distance + ROUGHNESS * rough < 1


def double_loop(
    pseudo_label: np.ndarray,
    masks: np.ndarray,
    o_s_thresh: float = 0.5,
    o_p_thresh: float = 0.85,
) -> np.ndarray:
    """What ``s4m_d2.sepl.enhance`` gives for an (H, W) label and (N, H, W) bool masks.

    The straightforward way: a loop over masks and, in it, over classes.
    """
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


def measure_sepl(args: argparse.Namespace) -> dict[str, Any]:
    """The forms checked, then timed in turns on the CPU, where all of them compute.

    Raises:
        Mismatch: two forms do not give the same.
    """
    made = scene()
    rles = encode_masks(torch.from_numpy(made.masks))
    forms = {
        DENSE: Form(lambda: enhance(made.label, made.masks)),
        RLE: Form(lambda: enhance(made.label, rles)),
        PLAIN: Form(lambda: double_loop(made.label, made.masks)),
    }
    expected = forms[PLAIN].run()
    for name in (DENSE, RLE):
        found = forms[name].run()
        checked(f"sepl, {name}", lambda found=found: np.testing.assert_array_equal(found, expected))
    clock = Clock(torch.device("cpu"))
    times = clock.measure(forms, repeats=args.repeats, warmup=args.warmup)
    return {
        "size": list(made.label.shape),
        "masks": len(made.masks),
        "classes": CLASSES,
        "forms": {name: summarize(values) for name, values in times.items()},
        "ratios": {name: ratio(times[PLAIN], times[name]) for name in (DENSE, RLE)},
    }
