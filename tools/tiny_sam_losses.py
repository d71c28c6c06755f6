"""Losses of the tiny SAM: masks, their predicted quality, and two auxiliary ones on the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

ENTROPY_WEIGHT, FAR_WEIGHT = 2.0, 0.5
WINDOW_MARGIN, WINDOW_GROWTH = 4, 0.4  # cells, share of the target's side
EDGE_WEIGHT, EDGE_REACH = 3.0, 2  # on top of 1; cells to either side of the contour
POSITIVE_WEIGHT = 1.4  # moves the threshold that is best for the IoU to 0
AFFINITY_DIM, AFFINITY_TEMPERATURE, ANCHORS = 32, 0.1, 192


class EncoderHead(nn.Module):
    """Auxiliary head on the image embedding, dropped after the training.

    A small encoder that starts from nothing learns slowly through the mask decoder alone. Two dense
    tasks tell each of its cells which others belong to its region, and where its instance is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affinity = nn.Conv2d(channels, AFFINITY_DIM, 1)
        self.shape = nn.Sequential(
            nn.Conv2d(channels, channels, 1), nn.GELU(), nn.Conv2d(channels, 4, 1)
        )

    def forward(
        self,
        embeddings: torch.Tensor,
        regions: torch.Tensor,
        shapes: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Scalar loss of embeddings (B, C, S, S) on regions (B, h, w) and shapes (B, 4, h, w)."""
        height, width = regions.shape[1:]
        embeddings = embeddings[..., :height, :width]
        instance = (shapes != 0).any(dim=1, keepdim=True).float()
        error = F.smooth_l1_loss(self.shape(embeddings), shapes, reduction="none", beta=0.1)
        shape_loss = (error * instance).sum() / (4 * instance.sum().clamp(min=1))
        vectors = F.normalize(self.affinity(embeddings).flatten(2), dim=1)
        affinity = [
            affinity_loss(v, r, generator) for v, r in zip(vectors, regions.flatten(1), strict=True)
        ]
        return shape_loss + torch.stack(affinity).mean()


def affinity_loss(
    vectors: torch.Tensor, regions: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Contrastive loss of unit vectors (C, n): cells of one region (n,) attract each other.

    Anchors are drawn so that every region counts the same, however small; region 0 is unknown.
    """
    known = torch.nonzero(regions > 0).squeeze(1)
    ids, inverse, counts = torch.unique(regions[known], return_inverse=True, return_counts=True)
    if len(ids) < 2:
        return vectors.sum() * 0
    chances = 1.0 / counts[inverse].float()
    chosen = torch.multinomial(chances, ANCHORS, replacement=True, generator=generator)
    vectors, regions = vectors[:, known], regions[known]
    similarity = vectors[:, chosen].T @ vectors / AFFINITY_TEMPERATURE
    same = regions[chosen, None] == regions[None]
    log_share = similarity.log_softmax(dim=1)
    return -((log_share * same).sum(dim=1) / same.sum(dim=1)).mean()


def mask_losses(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(N, M) cross entropy plus dice loss of logits (N, M, h, w) on soft targets (N, h, w).

    The cross entropy is a mean over a window around the target, its contour counting most, plus a
    weaker one over the rest, so that a small target is not drowned by its background.
    valid: (N, h, w) bool, False where the label is unknown.
    """
    target = targets[:, None].expand_as(logits)
    window = target_windows(targets)
    near = ((window & valid) * (1 + EDGE_WEIGHT * near_contour(targets)))[:, None]
    far = (~window & valid)[:, None]
    entropy = F.binary_cross_entropy_with_logits(
        logits, target, reduction="none", pos_weight=logits.new_tensor(POSITIVE_WEIGHT)
    )
    near_loss = (entropy * near).sum(dim=(2, 3)) / near.sum(dim=(2, 3)).clamp(min=1)
    far_loss = (entropy * far).sum(dim=(2, 3)) / far.sum(dim=(2, 3)).clamp(min=1)
    probability, target = logits.sigmoid() * valid[:, None], target * valid[:, None]
    overlap = 2 * (probability * target).sum(dim=(2, 3))
    extent = probability.pow(2).sum(dim=(2, 3)) + target.pow(2).sum(dim=(2, 3))
    dice = 1 - (overlap + 1) / (extent + 1)
    return ENTROPY_WEIGHT * (near_loss + FAR_WEIGHT * far_loss) + dice


def near_contour(targets: torch.Tensor) -> torch.Tensor:
    """(N, h, w) bool: the cells on both sides of the contours of targets (N, h, w)."""
    side = 2 * EDGE_REACH + 1
    inside = (targets > 0.5).float()[:, None]
    grown = F.max_pool2d(inside, side, stride=1, padding=EDGE_REACH)
    eroded = -F.max_pool2d(-inside, side, stride=1, padding=EDGE_REACH)
    return (grown > eroded).squeeze(1)


def target_windows(targets: torch.Tensor) -> torch.Tensor:
    """(N, h, w) bool: the box of each target (N, h, w), enlarged."""
    spans = []
    for axis in (2, 1):
        inside = (targets > 0).any(dim=axis)
        cells = torch.arange(inside.shape[1])
        start = torch.where(inside, cells, inside.shape[1]).amin(dim=1, keepdim=True)
        end = torch.where(inside, cells, -1).amax(dim=1, keepdim=True)
        margin = WINDOW_MARGIN + WINDOW_GROWTH * (end - start)
        spans.append((cells >= start - margin) & (cells <= end + margin))
    rows, columns = spans
    return rows[:, :, None] & columns[:, None, :]


def true_quality(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(N, M) IoU of the predicted masks with the targets."""
    predicted = (logits > 0) & valid[:, None]
    target = (targets > 0.5)[:, None]
    union = (predicted | target).sum(dim=(2, 3)).clamp(min=1)
    return (predicted & target).sum(dim=(2, 3)) / union
