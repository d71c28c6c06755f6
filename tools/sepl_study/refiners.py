"""SEPL's rule for instances beside the paper's three clicks: masks of a teacher that errs."""

from functools import partial
from typing import Any

import numpy as np
import torch
from make_cam_labels import label_generator
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sam.backend import SamBackend
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
STRIDE = 4  # image pixels per pixel of the teacher's prediction
WORSE = 0.05  # by more than this IoU
# As shares of the root of the instance's area.
MARGIN, STEP, BLUR = 0.12, 0.2, 0.2
NOISE_STRIDE, NOISE = 8, 1.5  # px, and logits
ERRORS = ("eroded", "cut in half", "shifted", "dilated", "blobs")


def _err(error: str, logits: Tensor, side: float, rng: np.random.Generator) -> Tensor:
    """(1, 1, H, W) logits of an instance with a side of ``side`` px, spoiled by one of ERRORS."""
    height, width = logits.shape[-2:]
    if error == "eroded":
        return -_err("dilated", -logits, side, rng)
    if error == "dilated":
        reach = max(1, int(MARGIN * side))
        return F.max_pool2d(logits, 2 * reach + 1, stride=1, padding=reach)
    if error == "shifted":
        angle = rng.uniform(0, 2 * np.pi)
        down, right = (round(STEP * side * turn) for turn in (np.sin(angle), np.cos(angle)))
        return F.pad(logits, [right, -right, down, -down], value=-LOGIT)
    if error == "blobs":
        reach = max(1, int(BLUR * side))
        soft = F.avg_pool2d(logits, 2 * reach + 1, 1, reach, count_include_pad=False)
        noise = rng.standard_normal((1, 1, -(-height // NOISE_STRIDE), -(-width // NOISE_STRIDE)))
        noise = torch.from_numpy(noise).float()
        return soft + NOISE * F.interpolate(noise, (height, width), mode="bicubic")
    axis, first = int(rng.integers(2)), bool(rng.integers(2))
    middle = int((logits[0, 0] > 0).nonzero()[:, axis].median())  # of its pixels
    lines = torch.arange(logits.shape[2 + axis])
    lost = lines < middle if first else lines >= middle
    return logits.masked_fill(lost[:, None] if axis == 0 else lost, -LOGIT)


def erring_selection(masks: np.ndarray, error: str, rng: np.random.Generator) -> Selection:
    """What a teacher that errs predicts of (N, H, W) bool masks, none empty, at 1/4 resolution."""
    logits = []
    for mask in torch.from_numpy(masks):
        exact = torch.where(mask, LOGIT, -LOGIT)[None, None]
        logits.append(_err(error, exact, float(mask.sum()) ** 0.5, rng))
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


def measure_refiners(scenes: list[StudyScene], backend: SamBackend) -> str:
    """Mean IoUs before and after, and which share of the masks became worse, in Markdown."""
    masks = _KeptMasks(AutomaticMasks(backend, SETTINGS))
    points = PointRefiner(backend=backend)
    rule = SEPLRefiner(backend=backend, automatic_masks=masks)
    lines = [
        f"| the teacher's masks are | before | points | sepl | worse by {WORSE}: points | sepl |",
        "|---|---|---|---|---|---|",
    ]
    for error in tqdm(ERRORS, desc="refiners"):
        measured = map(partial(_ious, error, refiners=(points, rule)), scenes)
        before, *after = (np.concatenate(parts) for parts in zip(*measured, strict=True))
        means = [f"{ious.mean():.2f}" for ious in (before, *after)]
        worse = [f"{(ious < before - WORSE).mean():.0%}" for ious in after]
        lines.append(f"| {' | '.join([error, *means, *worse])} |")
    return "\n".join(lines) + "\n"


def _ious(error: str, scene: StudyScene, refiners: tuple) -> list[np.ndarray]:
    """(N,) IoUs with the truth before and after each refiner, of instances with a pixel left."""
    size, truth = scene.truth.shape, exact_masks(scene)
    truth = truth[truth.sum((1, 2)) >= MIN_AREA]
    selection = erring_selection(truth, error, label_generator(0, f"{error} {scene.name}"))
    left = selection.labels.masks.any(2).any(1).numpy()
    found = [selection.masks_at(size).numpy()[left]]
    image = torch.from_numpy(scene.image).permute(2, 0, 1)[None]
    for refiner in refiners:
        generator = torch.Generator().manual_seed(int(scene.name))
        labels = refiner([selection], image, [size], [generator]).labels[0]
        found.append(labels.masks.numpy()[left])
    truth = truth[left]
    return [(of & truth).sum((1, 2)) / (of | truth).sum((1, 2)) for of in found]
