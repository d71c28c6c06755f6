"""What the study measures on a seed's scenes: IoUs of labels before and after, case by case."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cam_like import FAILURES
from make_cam_labels import CLASS_NAMES
from make_toyscapes import GENERATOR_VERSION

from s4m_d2.sepl import enhance
from s4m_d2.sepl.scores import ConfusionMatrix
from sepl_study.scenes import (
    StudyScene,
    background_masks,
    best_ious,
    exact_masks,
    fused_masks,
    whole_image,
)

ROOT = Path(__file__).resolve().parents[2]
# What results depend on beside their parameters.
SOURCES = (
    "datasets/cam_like.py",
    "s4m_d2/sepl/enhancement.py",
    "s4m_d2/sepl/overlaps.py",
    "s4m_d2/sepl/selection.py",
    "tools/sepl_study/cases.py",
    "tools/sepl_study/scenes.py",
)
STUDY_STRENGTH = 0.5  # mIoU 50 to 60, as published CAM labels of VOC have
FUSED_SHARES = (0.0, 0.25, 0.5, 1.0)
BEFORE, EXACT, TINY = "before", "exact masks", "tiny SAM"
OFF = 1.0  # of a threshold: never exceeded


@dataclass(frozen=True)
class Variant:
    """Masks by their kind, and options of ``enhance``."""

    masks: str
    options: Mapping[str, Any] = field(default_factory=dict)


PAPER = {EXACT: Variant(EXACT), TINY: Variant(TINY)}
SETTINGS = {
    f"{kind}, {name}": Variant(kind, options)
    for name, options in {
        "keep_uncovered": {"keep_uncovered": True},
        "without o_p": {"o_p_thresh": OFF},
        "without o_s": {"o_s_thresh": OFF},
    }.items()
    for kind in (EXACT, TINY)
}


def code_version() -> str:
    """Names the code that results come from."""
    texts = [(ROOT / source).read_bytes() for source in SOURCES]
    return f"{hashlib.sha256(b'|'.join(texts)).hexdigest()[:16]} toyscapes {GENERATOR_VERSION}"


def measure(
    scenes: Sequence[StudyScene],
    masks: Mapping[str, Sequence[Any]],
    variants: Mapping[str, Variant],
    seed: int,
    strength: float,
    failures: tuple[str, ...] = FAILURES,
) -> dict[str, list[float | None]]:
    """IoU of each class over all scenes, of the CAM-like labels and of each variant's.

    Args:
        masks: kind → those of each scene, as ``enhance`` takes them.
        variants: by the name that their IoUs get.
        seed, strength, failures: of the CAM-like labels.

    Returns:
        ``BEFORE`` and the variants' names → a number a class; None where it does not occur.
    """
    matrices = {name: ConfusionMatrix(len(CLASS_NAMES)) for name in (BEFORE, *variants)}
    for number, scene in enumerate(scenes):
        label = scene.cam_label(seed, strength, failures)
        matrices[BEFORE].update(scene.truth, label)
        for name, variant in variants.items():
            enhanced = enhance(label, masks[variant.masks][number], **variant.options)
            matrices[name].update(scene.truth, enhanced)
    return {
        name: [None if np.isnan(value) else float(value) for value in matrix.iou()]
        for name, matrix in matrices.items()
    }


def measure_studies(
    scenes: Sequence[StudyScene], tiny: Sequence[np.ndarray], seed: int
) -> dict[str, Any]:
    """Everything that is measured at one strength.

    Args:
        tiny: (N, H, W) bool of each scene, the tiny SAM's masks.

    Returns:
        Table → what :func:`measure` returns; ``masks``: the tiny SAM's masks an image, shares of
        the instances that have one of a large IoU, share of those that ``fused_masks`` fuses.
    """
    exact = [exact_masks(scene) for scene in scenes]
    masks = {EXACT: exact, TINY: tiny}
    studies = {
        f"{failure} only": measure(scenes, masks, PAPER, seed, STUDY_STRENGTH, (failure,))
        for failure in FAILURES
    }
    studies["settings"] = measure(scenes, masks, PAPER | SETTINGS, seed, STUDY_STRENGTH)
    bad = bad_masks(scenes, masks, seed)
    variants = {name: Variant(name) for name in bad}
    for kind in (EXACT, TINY):
        name = f"{kind} and the whole image"
        variants[f"{name}, without o_p"] = Variant(name, {"o_p_thresh": OFF})
    studies["bad masks"] = measure(scenes, bad, variants, seed, STUDY_STRENGTH)
    found = [iou for scene, of in zip(scenes, tiny, strict=True) for iou in best_ious(scene, of)]
    studies["masks"] = {
        "masks an image": float(np.mean([len(of) for of in tiny])),
        "IoU > 0.5": float(np.mean(np.array(found) > 0.5)),
        "IoU > 0.75": float(np.mean(np.array(found) > 0.75)),
        "fused": _lost(exact, bad[_fused(1.0)]),
    }
    return studies


def _lost(exact: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Share of masks that have no equal among the others of their image."""
    pairs = zip(exact, others, strict=True)
    return float(np.mean([not (of == mask).all((1, 2)).any() for own, of in pairs for mask in own]))


def _fused(share: float) -> str:
    return f"{share:.0%} of touching pairs fused"


def bad_masks(
    scenes: Sequence[StudyScene], masks: Mapping[str, Sequence[np.ndarray]], seed: int
) -> dict[str, list[np.ndarray]]:
    """Masks over several objects, of background regions and of the whole image, by their kind."""
    fused = {
        _fused(share): [fused_masks(scene, share, seed) for scene in scenes]
        for share in FUSED_SHARES
    }
    added = {"background regions": background_masks, "the whole image": whole_image}
    return fused | {
        f"{kind} and {name}": [
            np.concatenate([of, more(scene)]) for scene, of in zip(scenes, masks[kind], strict=True)
        ]
        for kind in (EXACT, TINY)
        for name, more in added.items()
    }
