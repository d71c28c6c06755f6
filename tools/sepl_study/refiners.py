"""SEPL's rule for instances beside the paper's three clicks: masks of a teacher that errs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from make_cam_labels import label_generator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sam.backend import SamBackend
from s4m_d2.semi.image_masks import teacher_masks
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import PointRefiner
from s4m_d2.sepl.refiner import SEPLRefiner
from s4m_d2.structures import PseudoLabels
from sepl_study.scenes import StudyScene, exact_masks

# As configs/toyscapes_10pct.yaml has them.
SETTINGS = AutomaticMaskSettings(
    points_per_side=12, pred_iou_thresh=0.6, stability_score_thresh=0.6
)
MIN_AREA = 64  # px: smaller instances are left out
LOGIT = 4.0  # of the pixels of a mask; the others have its negative
STRIDE = 4  # image pixels a pixel of the teacher's prediction
WORSE = 0.05  # by more than this IoU
# As shares of the root of the instance's area.
MARGIN, STEP, BLUR = 0.12, 0.2, 0.2
NOISE_STRIDE, NOISE = 8, 1.5  # px, and logits
BEFORE, POINTS, SEPL = "before", "points", "sepl"


def _eroded(logits: Tensor, side: float, rng: np.random.Generator) -> Tensor:
    return -_dilated(-logits, side, rng)


def _dilated(logits: Tensor, side: float, rng: np.random.Generator) -> Tensor:
    reach = max(1, int(MARGIN * side))
    return F.max_pool2d(logits, 2 * reach + 1, stride=1, padding=reach)


def _shifted(logits: Tensor, side: float, rng: np.random.Generator) -> Tensor:
    angle = rng.uniform(0, 2 * np.pi)
    steps = [round(STEP * side * turn) for turn in (np.sin(angle), np.cos(angle))]
    reach = max(map(abs, steps))
    height, width = logits.shape[-2:]
    padded = F.pad(logits, [reach] * 4, value=-LOGIT)
    top, left = (reach - step for step in steps)
    return padded[..., top : top + height, left : left + width]


def _blobby(logits: Tensor, side: float, rng: np.random.Generator) -> Tensor:
    reach = max(1, int(BLUR * side))
    soft = F.avg_pool2d(logits, 2 * reach + 1, 1, reach, count_include_pad=False)
    height, width = logits.shape[-2:]
    noise = rng.standard_normal((1, 1, -(-height // NOISE_STRIDE), -(-width // NOISE_STRIDE)))
    noise = torch.from_numpy(noise).float()
    return soft + NOISE * F.interpolate(noise, (height, width), mode="bicubic")


def _halved(logits: Tensor, side: float, rng: np.random.Generator) -> Tensor:
    """Without what lies on one side of the middle of its pixels."""
    axis, first = int(rng.integers(2)), bool(rng.integers(2))
    places = (logits[0, 0] > 0).nonzero()[:, axis]
    middle = int(places.median())
    lines = torch.arange(logits.shape[2 + axis])
    lost = lines < middle if first else lines >= middle
    lost = lost[:, None] if axis == 0 else lost[None]
    return logits.masked_fill(lost, -LOGIT)


ERRORS: dict[str, Callable[[Tensor, float, np.random.Generator], Tensor]] = {
    "eroded": _eroded,
    "cut in half": _halved,
    "shifted": _shifted,
    "dilated": _dilated,
    "blobs": _blobby,
}


def erring_selection(masks: np.ndarray, error: str, rng: np.random.Generator) -> Selection:
    """What a teacher that errs predicts, at a quarter of the image's resolution.

    Args:
        masks: (N, H, W) bool, the truth, none empty.
        error: a key of ERRORS.
        rng: of what is random in it.
    """
    logits = []
    for mask in torch.from_numpy(masks):
        exact = torch.where(mask, LOGIT, -LOGIT)[None, None]
        logits.append(ERRORS[error](exact, float(mask.sum()) ** 0.5, rng))
    size = [side // STRIDE for side in masks.shape[1:]]
    small = F.interpolate(torch.cat(logits), size, mode="bilinear", antialias=True)[:, 0]
    count = len(masks)
    labels = PseudoLabels(torch.zeros(count, dtype=torch.long), small > 0, torch.ones(count))
    return Selection(labels, small, tuple(map(float, size)), {})


class _KeptMasks:
    """Automatic masks of scenes by their pictures: those of a scene serve all errors."""

    def __init__(self, generator: AutomaticMasks) -> None:
        self._generator = generator
        self._masks: dict[bytes, list[dict]] = {}

    def generate(self, image: np.ndarray, encoded: Any = None) -> list[dict]:
        key = image.tobytes()
        if key not in self._masks:
            self._masks[key] = self._generator.generate(image, encoded)
        return self._masks[key]


def measure_refiners(
    scenes: Sequence[StudyScene], backend: SamBackend
) -> dict[str, dict[str, np.ndarray]]:
    """Error → method → (N,) IoU with the truth of all instances that have a pixel left."""
    masks = _KeptMasks(AutomaticMasks(backend, SETTINGS))
    refiners = {
        POINTS: PointRefiner(backend=backend),
        SEPL: SEPLRefiner(backend=backend, automatic_masks=masks),
    }
    found = {error: {name: [] for name in (BEFORE, *refiners)} for error in ERRORS}
    for scene in tqdm(scenes, desc="refiners", unit="image"):
        truth = exact_masks(scene)
        truth = truth[truth.sum((1, 2)) >= MIN_AREA]
        image = torch.from_numpy(scene.image).permute(2, 0, 1)[None]
        for error, ious in found.items():
            selection = erring_selection(truth, error, label_generator(0, f"{error} {scene.name}"))
            before = teacher_masks(selection, scene.size)
            left = selection.labels.masks.any(2).any(1).numpy()
            ious[BEFORE].append(_ious(before.numpy()[left], truth[left]))
            for name, refiner in refiners.items():
                generator = torch.Generator().manual_seed(int(scene.name))
                refined = refiner([selection], image, [scene.size], [generator]).labels[0]
                ious[name].append(_ious(refined.masks.numpy(), truth[left]))
    return {
        error: {name: np.concatenate(parts) for name, parts in ious.items()}
        for error, ious in found.items()
    }


def _ious(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    shared, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    return shared / either


def refiner_table(found: dict[str, dict[str, np.ndarray]]) -> str:
    """Mean IoUs, and which share of the masks each method made worse, in Markdown."""
    lines = [
        f"| the teacher's masks are | before | points | sepl | worse by {WORSE}: points | sepl |",
        "|---|---|---|---|---|---|",
    ]
    for error, ious in found.items():
        means = [f"{ious[name].mean():.2f}" for name in (BEFORE, POINTS, SEPL)]
        worse = [f"{(ious[name] < ious[BEFORE] - WORSE).mean():.0%}" for name in (POINTS, SEPL)]
        lines.append(f"| {' | '.join([error, *means, *worse])} |")
    return "\n".join(lines) + "\n"
