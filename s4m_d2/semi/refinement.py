"""Pseudo-label refinement: SAM's masks replace the teacher's (paper, section 3.3).

A refiner is a callable ``(selections, images, image_sizes, generators) -> Refinement``; its labels
are those of the selections, in their order. ``S4M.REFINE.METHOD`` selects one of REFINER_REGISTRY,
whose entries are builders ``(cfg, backend) -> refiner``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from fvcore.common.registry import Registry
from torch import Generator, Tensor

from s4m_d2.errors import registered, require
from s4m_d2.sam.backend import EncodedImages
from s4m_d2.sam.point_prompts import BOX_LABELS, PADDING_LABEL
from s4m_d2.semi.pseudo_labels import MASKS_AT_ONCE, Selection
from s4m_d2.structures import PseudoLabels, known_areas, mask_areas, mask_boxes
from s4m_d2.transfers import to_device, to_host

REFINER_REGISTRY = Registry("REFINER")
REFINER_REGISTRY.__doc__ = """Builders ``(cfg, backend) -> refiner`` of pseudo-label masks."""

PROMPTS = ("points", "box", "both")  # values of S4M.REFINE.PROMPT
AUTO_PROMPT = "auto"  # another value: chosen by the gate; points until then
PREDICTED_IOU, FALLBACKS = "refinement/predicted_iou", "refinement/fallbacks"  # as logged
NO_MASK = -1e3  # logit of an empty mask, below any threshold
MAX_PROMPT_LOGIT = 32.0  # of SAM's mask prompt, as SAM 2 clamps its own
MAX_GAP = 80.0  # largest difference to a mask's highest logit, so that no weight inside is zero
OUTSIDE = 1e30  # subtracted from the logits of pixels outside a mask


@dataclass(frozen=True)
class Refinement:
    """Pseudo-labels at image size."""

    labels: list[PseudoLabels]  #: of each image, (N, H, W) masks of its content; may be empty
    #: to log, numbers or 0-dim tensors on the device: the mean of SAM's predicted IoUs, and the
    #: share of instances that keep the teacher's mask
    stats: dict[str, float | Tensor] = field(default_factory=dict)


class TeacherMasks:
    """Refinement switched off: the teacher's masks, resized to the image."""

    @torch.no_grad()
    def __call__(
        self,
        selections: Sequence[Selection],
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        generators: Sequence[Generator] | None = None,
    ) -> Refinement:
        """See :class:`PointRefiner`; ``images`` and ``generators`` are not used."""
        labels = [
            selection.labels.with_masks(selection.masks_at(size))
            for selection, size in zip(selections, image_sizes, strict=True)
        ]
        return Refinement(labels)


class PointRefiner:
    """Replaces each mask by SAM's mask for points inside it, or for its box.

    The points of a mask are drawn by :func:`sample_mask_points` and form one prompt. Of SAM's
    masks the one with the highest predicted IoU is used, thresholded at logit 0; masks or IoUs that
    are not finite are ignored. If no mask remains, or it is empty, the teacher's mask is kept.
    Classes and scores do not change.

    Args:
        backend: a :class:`~s4m_d2.sam.backend.SamBackend`.
        num_points: points per mask; all pixels of a mask with fewer.
        prompt: one of PROMPTS; the paper uses points.
        min_agreement: keep the teacher's mask if its IoU with SAM's is smaller; in [0, 1].
        negative_points: points in other masks nearby, see :func:`neighbor_points`.
        mask_prompt: whether the teacher's mask logits are part of the prompt.
        tries: prompts per mask, with new points each; the answer with the highest predicted IoU is
            used.
    """

    @configurable
    def __init__(
        self,
        *,
        backend,
        num_points: int = 3,
        prompt: str = "points",
        min_agreement: float = 0.0,
        negative_points: int = 0,
        mask_prompt: bool = False,
        tries: int = 1,
    ) -> None:
        is_share, known = 0 <= min_agreement <= 1, f"one of {', '.join(PROMPTS)}"
        require("S4M.REFINE.NUM_POINTS", num_points, num_points >= 1, "1 or more")
        require("S4M.REFINE.PROMPT", prompt, prompt in PROMPTS, known)
        require("S4M.REFINE.MIN_AGREEMENT", min_agreement, is_share, "a number in [0, 1]")
        require("S4M.REFINE.NEGATIVE_POINTS", negative_points, negative_points >= 0, "0 or more")
        require("S4M.REFINE.TRIES", tries, tries >= 1, "1 or more")
        self.backend, self.num_points, self.prompt = backend, num_points, prompt
        self.negative_points, self.mask_prompt, self.tries = negative_points, mask_prompt, tries
        self.min_agreement = min_agreement

    @classmethod
    def from_config(cls, cfg, backend) -> dict:
        refine = cfg.S4M.REFINE
        prompt = PROMPTS[0] if refine.PROMPT == AUTO_PROMPT else refine.PROMPT
        keys = "NUM_POINTS", "MIN_AGREEMENT", "NEGATIVE_POINTS", "MASK_PROMPT", "TRIES"
        options = {key.lower(): refine[key] for key in keys}
        return {"backend": backend, "prompt": prompt, **options}

    @torch.no_grad()
    def __call__(
        self,
        selections: Sequence[Selection],
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        generators: Sequence[Generator] | None = None,
    ) -> Refinement:
        """Refine a batch. Only images with pseudo-labels are encoded.

        Args:
            selections: one for each image.
            images: (B, 3, H, W) RGB, 0..255, padded at the bottom and right: the weak view.
            image_sizes: (H, W) of the contents.
            generators: one for each image, on the CPU; None: PyTorch's own.
        """
        labels = [PseudoLabels.empty(size, images.device) for size in image_sizes]
        active = [i for i, selection in enumerate(selections) if len(selection.labels)]
        if not active:
            return Refinement(labels)
        chosen, sizes = [selections[i] for i in active], [image_sizes[i] for i in active]
        encoded = self.backend.encode(images[to_device(active, images.device)], sizes)
        draws = [generators[i] for i in active] if generators else [None] * len(active)
        best = self._ask(encoded, chosen, draws)
        stats: dict[str, Any] = {PREDICTED_IOU: torch.cat([ious for _, ious in best]).mean()}
        masks = [self._upscaled(*of_image) for of_image in zip(best, sizes, strict=True)]
        used = to_host(*map(self._used_areas, chosen, masks))
        for i, of_image, (_, ious), areas in zip(active, masks, best, used, strict=True):
            labels[i] = self._labels(selections[i], of_image, ious, areas)
        return Refinement(labels, stats | {FALLBACKS: float(np.mean(np.concatenate(used) == 0))})

    def _upscaled(self, best: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
        parts = best[0].split(MASKS_AT_ONCE)
        return torch.cat([self.backend.upscale(part, size) > 0 for part in parts])

    def _labels(
        self, selection: Selection, masks: Tensor, ious: Tensor, areas: np.ndarray
    ) -> PseudoLabels:
        """An image's labels with SAM's masks; where ``areas`` is 0 the teacher's overwrite them."""
        known: np.ndarray | None = areas
        if not areas.all():
            rows, known = to_device(np.flatnonzero(areas == 0), masks.device), None
            of_teacher = replace(selection, mask_logits=selection.mask_logits[rows])
            masks[rows] = of_teacher.masks_at((masks.shape[1], masks.shape[2]))
            ious[rows] = math.nan
        return replace(selection.labels, masks=masks, areas=known, sam_ious=ious)

    def _ask(
        self,
        encoded: EncodedImages,
        selections: Sequence[Selection],
        generators: Sequence[Generator | None],
    ) -> list[tuple[Tensor, Tensor]]:
        """Logits (N, h, w) of SAM's best masks of each image, and their predicted IoUs (N,)."""
        options = {}
        if self.mask_prompt:
            pairs = zip(selections, encoded.image_sizes, strict=True)
            options["mask_prompts"] = [self._mask_prompts(*pair) for pair in pairs]
        best: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.tries):
            points, labels = zip(*map(self._prompts, selections, generators), strict=True)
            outputs = self.backend.prompt(encoded, points, labels, **options)
            answers = [_best_masks(out.mask_logits, out.iou_predictions) for out in outputs]
            best = list(map(_better, best, answers)) if best else answers
        return best

    def _mask_prompts(self, selection: Selection, image_size: tuple[int, int]) -> Tensor:
        """The teacher's mask logits in SAM's square frame: (N, 4S, 4S), lowest in the padding."""
        side = 4 * self.backend.grid_side
        width, height = (side * scale for scale in self.backend.grid_scale(image_size))
        clamp = partial(torch.clamp, min=-MAX_PROMPT_LOGIT, max=MAX_PROMPT_LOGIT)
        prompts = selection.resized(clamp, (height, width), (side, side))
        prompts[:, math.ceil(height) :] = -MAX_PROMPT_LOGIT
        prompts[:, :, math.ceil(width) :] = -MAX_PROMPT_LOGIT
        return prompts

    def _prompts(self, selection: Selection, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Points (N, P, 2) and their labels (N, P), on the CPU unless some are negative."""
        parts = []
        if self.prompt != "box":
            parts.append(sample_mask_points(selection, self.num_points, generator))
        if self.prompt != "points":
            masks = selection.labels.masks
            corners = _normalized(mask_boxes(masks).view(-1, 2, 2), selection)
            parts.append((corners, torch.tensor(BOX_LABELS).expand(len(masks), 2)))
        if self.negative_points:
            parts.append(neighbor_points(selection, self.negative_points))
        points, labels = zip(*parts, strict=True)
        device = labels[-1].device
        return torch.cat(points, dim=1), torch.cat([to_device(x, device) for x in labels], dim=1)

    def _used_areas(self, selection: Selection, masks: Tensor) -> Tensor:
        """(N,) areas of SAM's masks (N, H, W); 0 also where the agreement is too small."""
        areas = mask_areas(masks)
        if self.min_agreement > 0:
            teachers = selection.masks_at((masks.shape[1], masks.shape[2]))
            shared, either = mask_areas(masks & teachers), mask_areas(masks | teachers)
            areas = areas.masked_fill(shared < self.min_agreement * either, 0)
        return areas


@REFINER_REGISTRY.register()
def points(cfg, backend) -> PointRefiner:
    """``S4M.REFINE.METHOD: points``, the paper's refinement."""
    return PointRefiner(cfg, backend)


def build_refiner(cfg, backend) -> Callable[..., Refinement]:
    """Build the refiner selected by the config; ``backend`` may be None if it needs no SAM."""
    if not cfg.S4M.REFINE.ENABLED:
        return TeacherMasks()
    entry = registered(REFINER_REGISTRY, "S4M.REFINE.METHOD", cfg.S4M.REFINE.METHOD)
    return entry(cfg, backend)


def sample_mask_points(
    selection: Selection, num_points: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw points inside each mask, without replacement, P(pixel) ∝ softmax of the mask logits.

    The softmax is over the pixels inside the mask. Pixels are drawn one after the other by inverse
    transform sampling, first the row, then the column, for all masks at once; each point uses one
    random number. Differences of logits are clamped at MAX_GAP.

    Returns:
        points (N, P, 2): pixel centers (x, y), normalized to the content, within [0, 1];
        labels (N, P) int64, on the CPU: 1, or -1 (padding) for a mask with fewer than P pixels.
    """
    masks = selection.labels.masks
    draws = torch.rand((len(masks), num_points), generator=generator, dtype=torch.float64)
    pixels = _draw(selection.mask_logits, masks, to_device(draws, masks.device))
    [areas] = known_areas([selection.labels])
    labels = np.where(np.arange(num_points) < areas[:, None], 1, PADDING_LABEL)
    return _normalized(pixels + 0.5, selection), torch.from_numpy(labels)


def neighbor_points(selection: Selection, num_points: int) -> tuple[Tensor, Tensor]:
    """Negative points for each mask: one in each of the nearest other masks, by their centers.

    It is the pixel of the other mask with the highest logit that is not in this one.

    Returns:
        points (N, P, 2), as of :func:`sample_mask_points`, and labels (N, P) int64: 0, or -1
        (padding) where the other mask has no such pixel; on the device, P < N.
    """
    masks, logits = selection.labels.masks, selection.mask_logits
    count, _, width = masks.shape
    profiles = [masks.sum(dim=dim, dtype=torch.float32) for dim in (2, 1)]  # of rows, of columns
    sums = [(x * torch.arange(x.shape[1], device=x.device)).sum(dim=1) for x in profiles]
    centers = torch.stack(sums, dim=1) / profiles[0].sum(dim=1, keepdim=True)
    exactly = "donot_use_mm_for_euclid_dist"  # TF32 would move centers by some px
    distances = torch.cdist(centers, centers, compute_mode=exactly).fill_diagonal_(torch.inf)
    nearest = distances.topk(max(min(num_points, count - 1), 0), largest=False).indices
    points, labels = [centers.new_zeros(count, 0, 2)], [nearest.new_zeros(count, 0)]
    for other in nearest.unbind(dim=1):
        beside = logits[other].masked_fill(masks | ~masks[other], -torch.inf).flatten(1)
        highest, place = beside.max(dim=1, keepdim=True)
        points.append(torch.stack([place % width, place // width], dim=2) + 0.5)
        labels.append(torch.where(highest > -torch.inf, 0, PADDING_LABEL))
    return _normalized(torch.cat(points, dim=1), selection), torch.cat(labels, dim=1)


def _normalized(points: Tensor, selection: Selection) -> Tensor:
    """Points (N, P, 2), (x, y) in pixels of a selection's masks, in [0, 1] over the content."""
    extent = to_device(selection.content_size[::-1], points.device, torch.float32)
    return (points / extent).clamp(max=1.0)


def _draw(logits: Tensor, masks: Tensor, draws: Tensor) -> Tensor:
    """(N, P, 2) pixels (x, y) inside (N, h, w) masks by (N, P) float64 draws in [0, 1)."""
    inside = masks.view(torch.uint8).to(logits.dtype)
    weights = (inside - 1.0).mul_(OUTSIDE).add_(logits)
    weights = weights.sub_(weights.amax(dim=(1, 2), keepdim=True)).clamp_(min=-MAX_GAP).exp_()
    weights.mul_(inside)
    of_rows = weights.sum(dim=2).double()
    mask = torch.arange(len(weights), device=weights.device)
    pixels = []
    for draw in draws.unbind(dim=1):
        row, share = _invert(of_rows, draw)
        line = weights[mask, row].double()
        column, _ = _invert(line, share)
        pixels.append(torch.stack([column, row], dim=1))
        weights[mask, row, column] = weights.new_zeros(())  # without replacement
        left = line.scatter_(1, column[:, None], 0.0).sum(dim=1, keepdim=True)
        of_rows.scatter_(1, row[:, None], left)
    return torch.stack(pixels, dim=1)


def _invert(weights: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) indices drawn with P ∝ (N, L) weights, and the rest of each draw, uniform in [0, 1).

    An index of weight zero is drawn only if all weights are zero.
    """
    ends = weights.cumsum(dim=1)
    target = draw * ends[:, -1]
    place = (ends <= target[:, None]).sum(dim=1).clamp(max=weights.shape[1] - 1)
    weight = weights.gather(1, place[:, None])[:, 0]
    start = ends.gather(1, place[:, None])[:, 0] - weight
    below_one = 1.0 - torch.finfo(weights.dtype).eps
    return place, ((target - start) / weight).nan_to_num().clamp(0.0, below_one)


def _best_masks(mask_logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Select (N, h, w) of (N, M, h, w) masks by the best of (N, M) IoUs; also returns these (N,).

    Only finite ones count; if there is none, the mask is empty and the IoU 0.
    """
    dims = (2, 3)
    usable = mask_logits.amax(dim=dims).isfinite() & mask_logits.amin(dim=dims).isfinite()
    best, chosen = ious.masked_fill(~(usable & ious.isfinite()), -math.inf).max(dim=1)
    masks = mask_logits[torch.arange(len(chosen), device=chosen.device), chosen]
    found = best > -math.inf
    return masks.masked_fill_(~found[:, None, None], NO_MASK), best.where(found, 0.0)


def _better(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two answers to each prompt, masks (N, h, w) and IoUs (N,), that with the higher IoU."""
    wins = second[1] > first[1]
    return second[0].where(wins[:, None, None], first[0]), second[1].where(wins, first[1])
