"""Pseudo-label refinement: SAM redraws the teacher's masks (paper, section 3.3).

A refiner is a callable ``(selections, images, image_sizes, generators) -> Refinement``. The name
``S4M.REFINE.METHOD`` is looked up in REFINER_REGISTRY, whose entries are called as
``entry(cfg, backend)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from fvcore.common.registry import Registry
from torch import Generator, Tensor

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.structures import PseudoLabels

REFINER_REGISTRY = Registry("REFINER")
REFINER_REGISTRY.__doc__ = """Builders ``(cfg, backend) -> refiner`` of pseudo-label masks."""

POSITIVE, PADDING = 1, -1  # labels of prompt points
NO_MASK = -1e3  # a logit that is outside wherever a mask is thresholded
MASKS_AT_ONCE = 16  # masks resized to image size together; bounds the memory


@dataclass(frozen=True)
class Refinement:
    """Pseudo-labels at image size.

    Attributes:
        labels: for each image, its pseudo-labels with (N, H, W) masks at content size, none empty.
        predicted_ious: SAM's prediction for the chosen mask of every prompted instance, all images
            together; of length 0 without SAM.
        num_fallbacks: how many of these masks were empty or not finite and gave way to the
            teacher's.
    """

    labels: list[PseudoLabels]
    predicted_ious: Tensor
    num_fallbacks: int = 0


class TeacherMasks:
    """Refinement switched off: the teacher's masks, resized to the image.

    Args:
        mask_thresh: probability above which a pixel belongs to the mask, in (0, 1).
    """

    @configurable
    def __init__(self, *, mask_thresh: float = 0.5) -> None:
        self.logit_thresh = _logit(mask_thresh)

    @classmethod
    def from_config(cls, cfg) -> dict:
        return {"mask_thresh": cfg.S4M.PSEUDO_LABEL.MASK_THRESH}

    @torch.no_grad()
    def __call__(
        self,
        selections: Sequence[Selection],
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        generators: Sequence[Generator] | None = None,
    ) -> Refinement:
        """See :class:`PointRefiner`; of ``images`` only the device is used."""
        _check_batch(selections, images, image_sizes, generators)
        labels = [
            _without_empty(
                selection.labels.with_masks(teacher_masks(selection, size, self.logit_thresh))
            )
            for selection, size in zip(selections, image_sizes, strict=True)
        ]
        return Refinement(labels, predicted_ious=torch.zeros(0, device=images.device))


class PointRefiner:
    """Replaces each mask by what SAM segments from a few clicks inside it.

    The clicks of a mask are drawn by :func:`sample_mask_points` and prompt SAM together; of its
    multi-mask output the mask with the highest predicted IoU is taken, thresholded at logit 0.
    Masks or IoUs that are not finite do not count. Where nothing or an empty mask is left, the
    teacher's mask stays. Classes and scores stay.

    Args:
        backend: a :class:`~s4m_d2.sam.backend.SamBackend`.
        num_points: clicks a mask; all pixels where it has fewer.
        mask_thresh: threshold of the teacher's masks that are fallen back to, in (0, 1).
    """

    @configurable
    def __init__(self, *, backend, num_points: int = 3, mask_thresh: float = 0.5) -> None:
        if num_points < 1:
            raise InputError(f"num_points (S4M.REFINE.NUM_POINTS) must be >= 1, got {num_points}")
        self.backend = backend
        self.num_points = num_points
        self.logit_thresh = _logit(mask_thresh)

    @classmethod
    def from_config(cls, cfg, backend) -> dict:
        return {
            "backend": backend,
            "num_points": cfg.S4M.REFINE.NUM_POINTS,
            "mask_thresh": cfg.S4M.PSEUDO_LABEL.MASK_THRESH,
        }

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
            generators: one for each image, on the device of ``images``; None: PyTorch's own.

        Returns:
            Labels at content size. Instances without any pixel, before or after, are left out.

        Raises:
            InputError: if the numbers of selections, images, sizes and generators differ.
        """
        _check_batch(selections, images, image_sizes, generators)
        selections = [_clickable(selection) for selection in selections]
        labels = [PseudoLabels.empty(size, images.device) for size in image_sizes]
        active = [i for i, selection in enumerate(selections) if len(selection.labels)]
        ious, fallbacks = [torch.zeros(0, device=images.device)], 0
        if active:
            encoded = self.backend.encode(images[active], [image_sizes[i] for i in active])
            prompts = [
                sample_mask_points(
                    selections[i], self.num_points, generators[i] if generators else None
                )
                for i in active
            ]
            clicks, click_labels = map(list, zip(*prompts, strict=True))
            outputs = self.backend.prompt(encoded, clicks, click_labels)
            for i, output in zip(active, outputs, strict=True):
                low_res, iou = _best_masks(output.mask_logits, output.iou_predictions)
                masks, empty = self._image_masks(selections[i], low_res, image_sizes[i])
                labels[i] = _without_empty(selections[i].labels.with_masks(masks))
                ious.append(iou)
                fallbacks += empty
        return Refinement(labels, torch.cat(ious), fallbacks)

    def _image_masks(
        self, selection: Selection, mask_logits: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, int]:
        """(N, H, W) bool masks and how many of them are the teacher's."""
        masks = _upscale_in_chunks(
            mask_logits, image_size, lambda chunk: self.backend.upscale(chunk, image_size) > 0
        )
        empty = ~masks.flatten(1).any(dim=1)
        count = int(empty.sum())
        if count:
            dropped = replace(selection, mask_logits=selection.mask_logits[empty])
            masks[empty] = teacher_masks(dropped, image_size, self.logit_thresh)
        return masks, count


@REFINER_REGISTRY.register()
def points(cfg, backend) -> PointRefiner:
    """``S4M.REFINE.METHOD: points``, the paper's refinement."""
    return PointRefiner(cfg, backend)


def build_refiner(cfg, backend) -> Callable[..., Refinement]:
    """The refiner that the config selects; ``backend`` may be None where it needs no SAM.

    Raises:
        ConfigError: if S4M.REFINE.METHOD is not registered.
    """
    if not cfg.S4M.REFINE.ENABLED:
        return TeacherMasks(cfg)
    method = cfg.S4M.REFINE.METHOD
    if method not in REFINER_REGISTRY:
        known = ", ".join(sorted(name for name, _ in REFINER_REGISTRY))
        raise ConfigError(f"S4M.REFINE.METHOD {method!r} is not registered; choose from: {known}")
    return REFINER_REGISTRY.get(method)(cfg, backend)


def sample_mask_points(
    selection: Selection, num_points: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw clicks inside each mask, without replacement, P(pixel) ∝ softmax of the mask logits.

    The softmax runs over the pixels inside the mask. Perturbing the logits by Gumbel noise and
    taking the largest is exactly this draw, for all masks at once.

    Returns:
        points (N, P, 2): pixel centers (x, y), normalized to the content, within [0, 1];
        labels (N, P) int64: 1, or -1 in the places that a mask with too few pixels cannot fill.
    """
    masks, logits = selection.labels.masks, selection.mask_logits
    width = logits.shape[2]
    noise = torch.empty_like(logits).exponential_(generator=generator)
    gumbel = -noise.clamp_min(torch.finfo(noise.dtype).tiny).log()
    keys = (logits + gumbel).masked_fill(~masks, -math.inf).flatten(1)
    keys, index = keys.topk(min(num_points, keys.shape[1]), dim=1)
    pixels = torch.stack([index % width, index // width], dim=-1)
    extent = keys.new_tensor(selection.content_size[::-1])
    clicks = ((pixels + 0.5) / extent).clamp(max=1.0)
    labels = torch.where(keys > -math.inf, POSITIVE, PADDING)
    return clicks, labels


def _best_masks(mask_logits: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, M, h, w) masks the (N, h, w) ones with the best of (N, M) IoUs, and these (N,).

    Only finite ones count; where there is none, the mask is empty and the IoU 0.
    """
    usable = ious.isfinite() & mask_logits.isfinite().flatten(2).all(dim=2)
    best, chosen = ious.masked_fill(~usable, -math.inf).max(dim=1)
    masks = mask_logits[torch.arange(len(chosen), device=chosen.device), chosen]
    found = best > -math.inf
    return masks.where(found[:, None, None], masks.new_tensor(NO_MASK)), best.where(found, 0.0)


def teacher_masks(
    selection: Selection, image_size: tuple[int, int], logit_thresh: float = 0.0
) -> Tensor:
    """The selection's masks at ``image_size`` (H, W): logits read bilinearly, then thresholded.

    Both frames show the same content, also where it ends inside a pixel of the prediction.
    """
    logits = selection.mask_logits
    axes = [
        (torch.arange(side, device=logits.device) + 0.5) * (2 * extent / (side * pixels)) - 1
        for side, extent, pixels in zip(
            image_size, selection.content_size, logits.shape[1:], strict=True
        )
    ]
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None]

    def resize(chunk: Tensor) -> Tensor:
        resized = F.grid_sample(
            chunk[None], grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return resized[0] > logit_thresh

    return _upscale_in_chunks(logits, image_size, resize)


def _upscale_in_chunks(
    logits: Tensor, image_size: tuple[int, int], to_masks: Callable[[Tensor], Tensor]
) -> Tensor:
    masks = torch.empty((len(logits), *image_size), dtype=torch.bool, device=logits.device)
    for start in range(0, len(logits), MASKS_AT_ONCE):
        chunk = slice(start, start + MASKS_AT_ONCE)
        masks[chunk] = to_masks(logits[chunk])
    return masks


def _clickable(selection: Selection) -> Selection:
    """Only the instances that have a pixel to click on."""
    keep = selection.labels.masks.flatten(1).any(dim=1)
    return replace(
        selection, labels=selection.labels[keep], mask_logits=selection.mask_logits[keep]
    )


def _without_empty(labels: PseudoLabels) -> PseudoLabels:
    return labels[labels.masks.flatten(1).any(dim=1)]


def _logit(probability: float) -> float:
    if not 0.0 < probability < 1.0:
        raise InputError(
            f"mask_thresh (S4M.PSEUDO_LABEL.MASK_THRESH) must lie in (0, 1), got {probability}"
        )
    return math.log(probability / (1.0 - probability))


def _check_batch(selections, images, image_sizes, generators) -> None:
    counts = [len(selections), len(images), len(image_sizes)]
    counts += [len(generators)] if generators else []
    if len(set(counts)) > 1:
        raise InputError(
            "selections, images, image_sizes and generators must name the same images, "
            f"got {counts} of them"
        )
