"""Mask losses on sampled points (PointRend, Mask2Former). Points are (x, y) in [0, 1]."""

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import point_sample
from torch import Tensor

from s4m_d2.transfers import to_device

# Pixels of masks that are converted to float32 at once; on a CPU they should fit its cache.
PIXELS_AT_ONCE = {"cpu": 1 << 21, "other": 1 << 26}
POINTS_AT_ONCE = 1 << 23  # candidates of the uncertain points drawn at once


def draw_points(
    count: int, num_points: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """(count, num_points, 2) float32 uniform points; None draws from torch's default generator."""
    source = device if generator is None else generator.device
    return to_device(torch.rand(count, num_points, 2, generator=generator, device=source), device)


def sample_each(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of each mask at its own points: (N, H, W), (N, P, 2) -> (N, P) float32."""
    return point_sample(masks[:, None].float(), points, align_corners=False)[:, 0]


def sample_shared(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of all masks at the same points: (N, H, W), (P, 2) -> (N, P) float32.

    Masks of other types than float32 are converted in chunks.
    """
    if len(masks) == 0:
        return masks.new_zeros((0, len(points)), dtype=torch.float32)
    parts = masks.split(_masks_at_once(masks))
    read = [point_sample(p[None].float(), points[None], align_corners=False)[0] for p in parts]
    return torch.cat(read)


def sample_chosen(masks: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """:func:`sample_each` of ``masks[chosen]``, of any type, which are copied in chunks."""
    size = _masks_at_once(masks)
    pairs = zip(chosen.split(size), points.split(size), strict=True)
    return torch.cat([sample_each(masks.index_select(0, part), its) for part, its in pairs])


def _masks_at_once(masks: Tensor) -> int:
    pixels = PIXELS_AT_ONCE.get(masks.device.type, PIXELS_AT_ONCE["other"])
    return max(1, pixels // max(1, masks.shape[1] * masks.shape[2]))


def uncertain_points(
    mask_logits: Tensor,
    *,
    num_points: int,
    oversample_ratio: float,
    importance_ratio: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw (N, num_points, 2) float32 points for (N, H, W) masks of an image, mostly where they are
    uncertain.

    Of ``num_points * oversample_ratio`` uniform candidates per mask, the
    ``num_points * importance_ratio`` whose logit is nearest to zero are kept; the other points are
    uniform. Points are drawn mask by mask, in chunks that bound the memory.
    """
    num_candidates = int(num_points * oversample_ratio)
    num_important = int(num_points * importance_ratio)
    num_uniform = num_points - num_important
    parts = []
    for logits in mask_logits.detach().split(max(1, POINTS_AT_ONCE // num_candidates)):
        count = num_candidates + num_uniform
        drawn = draw_points(len(logits), count, generator, logits.device)
        candidates, uniform = drawn.split([num_candidates, num_uniform], dim=1)
        doubt = sample_each(logits, candidates).abs_().neg_()  # what is NaN comes first
        chosen = doubt.topk(num_important, dim=1, sorted=False).indices
        important = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        parts.append(torch.cat([important, uniform], dim=1))
    return torch.cat(parts)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2·Σpt + 1) / (Σp + Σt + 1) of each row: (N, P) logits, (N, P) in [0, 1] -> (N,)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(-1)
    return 1 - (overlap + 1) / (probabilities.sum(-1) + targets.sum(-1) + 1)


def sigmoid_ce_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of each row: (N, P) logits, (N, P) in [0, 1] -> (N,).

    Weighted by (N, P) ``weights``, if given, whose sum over a row is above 0.
    """
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return each.mean(-1) if weights is None else (each * weights).sum(-1) / weights.sum(-1)


def pairwise_dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`dice_loss` of every pair: (..., Q, P) logits, (..., N, P) targets -> (..., Q, N)."""
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities @ targets.mT)
    totals = probabilities.sum(-1)[..., :, None] + targets.sum(-1)[..., None, :]
    return 1 - (overlap + 1) / (totals + 1)


def pairwise_sigmoid_ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`sigmoid_ce_loss` of every pair: (..., Q, P), (..., N, P) -> (..., Q, N).

    From ``bce(x, t) = softplus(x) - x·t``, so that one matrix product serves all pairs, and
    ``softplus(x) = max(x, 0) - log sigmoid(|x|)``, whose parts are several times as fast on a CPU.
    """
    softplus = logits.relu() - logits.abs().sigmoid_().log_()
    return (softplus.sum(-1)[..., None] - logits @ targets.mT) / logits.shape[-1]
