"""Mask losses on sampled points (PointRend, Mask2Former). Points are (x, y) in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import point_sample
from torch import Tensor


def draw_points(
    count: int, num_points: int, *, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """(count, num_points, 2) float32 uniform points; None draws from torch's default generator."""
    source = device if generator is None else generator.device
    return torch.rand(count, num_points, 2, generator=generator, device=source).to(device)


def sample_each(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of each mask at its own points: (N, H, W), (N, P, 2) -> (N, P) float32."""
    if len(masks) == 0:
        return masks.new_zeros(points.shape[:2], dtype=torch.float32)
    return point_sample(masks[:, None].float(), points, align_corners=False)[:, 0]


def sample_shared(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of all masks at the same points: (N, H, W), (P, 2) -> (N, P) float32."""
    if len(masks) == 0:
        return masks.new_zeros((0, len(points)), dtype=torch.float32)
    return point_sample(masks[None].float(), points[None], align_corners=False)[0]


def uncertain_points(
    mask_logits: Tensor,
    counts: Sequence[int],
    *,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
    generators: Sequence[torch.Generator | None] | None = None,
) -> Tensor:
    """Draw points that lie mostly where a mask is undecided.

    Of ``num_points * oversample_ratio`` uniform candidates a mask, the
    ``num_points * importance_ratio`` whose logit is nearest to zero are kept; further uniform
    points fill up. The points of an image depend on its own masks and generator only.

    Args:
        mask_logits: (N, H, W), the masks of all images, image after image.
        counts: number of masks of each image; they add up to N.
        generators: one for each image, or None for torch's default one.

    Returns:
        (N, num_points, 2) float32, without gradient.
    """
    num_candidates = int(num_points * oversample_ratio)
    num_important = int(num_points * importance_ratio)
    num_uniform = num_points - num_important
    drawn = torch.cat(
        [
            draw_points(
                count,
                num_candidates + num_uniform,
                generator=generator,
                device=mask_logits.device,
            )
            for count, generator in zip(counts, generators or [None] * len(counts), strict=True)
        ]
    )
    candidates, uniform = drawn.split([num_candidates, num_uniform], dim=1)
    with torch.no_grad():
        doubt = -sample_each(mask_logits, candidates).abs()
    chosen = doubt.topk(num_important, dim=1, sorted=False).indices
    important = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    return torch.cat([important, uniform], dim=1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2·Σpt + 1) / (Σp + Σt + 1) of each row: (N, P) logits, (N, P) in [0, 1] -> (N,)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(-1)
    return 1 - (overlap + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)


def sigmoid_ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of each row: (N, P) logits, (N, P) in [0, 1] -> (N,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def pairwise_dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`dice_loss` of every pair: (Q, P) logits, (N, P) targets -> (Q, N)."""
    probabilities = logits.sigmoid()
    overlap = 2 * probabilities @ targets.T
    return 1 - (overlap + 1) / (probabilities.sum(-1)[:, None] + targets.sum(-1) + 1)


def pairwise_sigmoid_ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`sigmoid_ce_loss` of every pair: (Q, P) logits, (N, P) targets -> (Q, N).

    From ``bce(x, t) = softplus(x) - x·t``, so that one matrix product serves all pairs.
    """
    return (F.softplus(logits).sum(-1)[:, None] - logits @ targets.T) / logits.shape[1]
