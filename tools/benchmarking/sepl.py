"""SEPL's enhancement of one pseudo-label, of dense masks and of RLEs, beside a double loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tabulate import tabulate

from benchmarking import plain_sepl
from benchmarking.checks import require
from benchmarking.timing import Clock, Form, measure, ratio, summarize
from s4m_d2.engine.rng import derive_seed
from s4m_d2.sepl import VOID, enhance
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
    for index, (center, radius) in enumerate(zip(centers, radii, strict=True)):
        whole = _blob(center, radius, size, draws)
        objects.append(whole)
        label[_blob(center + draws.normal(0, 0.2 * radius, 2), 0.8 * radius, size, draws)] = (
            index + 1
        )
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
    by_area = sorted(masks, key=np.count_nonzero, reverse=True)
    return Scene(label, np.array(by_area))


def _blob(
    center: np.ndarray, radius: float, size: tuple[int, int], draws: np.random.Generator
) -> np.ndarray:
    """(H, W) bool: an ellipse with a rough border around ``center`` (y, x)."""
    rough = cv2.resize(draws.normal(size=(16, 16)), size[::-1], interpolation=cv2.INTER_CUBIC)
    stretch = draws.uniform(0.7, 1.4)
    y, x = np.ogrid[: size[0], : size[1]]
    distance = np.hypot((y - center[0]) / stretch, (x - center[1]) * stretch) / radius
    return distance + ROUGHNESS * rough < 1


def forms_of(made: Scene) -> dict[str, Form]:
    """The two ways to give masks to ours, and the plain form, by name."""
    rles = encode_masks(torch.from_numpy(made.masks))
    return {
        DENSE: Form(lambda: enhance(made.label, made.masks)),
        RLE: Form(lambda: enhance(made.label, rles)),
        PLAIN: Form(lambda: plain_sepl.enhance(made.label, made.masks)),
    }


def check_forms(forms: dict[str, Form]) -> None:
    """Raises: Mismatch: a form differs from the plain one in a pixel."""
    plain = forms[PLAIN].run()
    for name in (DENSE, RLE):
        require(np.array_equal(forms[name].run(), plain), f"sepl, {name}")


def measure_sepl(
    *, repeats: int, warmup: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The forms checked, then timed in turns on the CPU, where all of them compute.

    Raises:
        Mismatch: two forms do not give the same.
    """
    say("sepl")
    made = scene()
    forms = forms_of(made)
    check_forms(forms)
    times = measure(forms, Clock(torch.device("cpu")), repeats=repeats, warmup=warmup)
    return {
        "size": list(made.label.shape),
        "masks": len(made.masks),
        "classes": CLASSES,
        "forms": {name: asdict(summarize(values)) for name, values in times.items()},
        "ratios": {name: asdict(ratio(times[PLAIN], times[name])) for name in (DENSE, RLE)},
    }


def sepl_table(result: dict[str, Any]) -> str:
    """One line a form."""
    rows = []
    for name, seconds in result["forms"].items():
        found = result["ratios"].get(name)
        rows.append(
            [
                name,
                *(f"{1e3 * seconds[key]:.1f}" for key in ("median", "lower", "upper")),
                f"{found['median']:.1f}x ({found['lower']:.1f} – {found['upper']:.1f})"
                if found
                else "",
            ]
        )
    height, width = result["size"]
    title = (
        f"SEPL, one pseudo-label of {height} x {width}, {result['masks']} masks, "
        f"{result['classes']} classes"
    )
    headers = ["form", "ms", "lower", "upper", "loop/ours"]
    return f"{title}\n{tabulate(rows, headers=headers, disable_numparse=True)}"
