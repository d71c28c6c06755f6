"""Prompt points inside masks, and in their neighbors, for all masks of an image on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.structures import known_areas
from s4m_d2.transfers import to_device

POSITIVE, NEGATIVE, PADDING = 1, 0, -1  # labels of prompt points
MAX_GAP = 80.0  # largest difference to a mask's highest logit, so that no weight inside is zero
OUTSIDE = 1e30  # subtracted from the logits of pixels outside


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
    masks, device = selection.labels.masks, "cpu" if generator is None else generator.device
    shape = len(masks), num_points
    draws = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    pixels = _draw(selection.mask_logits, masks, to_device(draws, masks.device))
    extent = to_device(selection.content_size[::-1], masks.device, torch.float32)
    [areas] = known_areas([selection.labels])
    labels = np.where(np.arange(num_points) < areas[:, None], POSITIVE, PADDING)
    return ((pixels + 0.5) / extent).clamp(max=1.0), torch.from_numpy(labels)


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
    places = [torch.arange(part.shape[1], device=part.device) for part in profiles]
    sums = [(part * place).sum(dim=1) for part, place in zip(profiles, places, strict=True)]
    centers = torch.stack(sums, dim=1) / profiles[0].sum(dim=1, keepdim=True)
    distances = torch.cdist(centers, centers).fill_diagonal_(torch.inf)
    nearest = distances.topk(max(min(num_points, count - 1), 0), largest=False).indices
    points, labels = [centers.new_zeros(count, 0, 2)], [nearest.new_zeros(count, 0)]
    for other in nearest.unbind(dim=1):
        beside = logits[other].masked_fill(masks | ~masks[other], -torch.inf).flatten(1)
        highest, place = beside.max(dim=1, keepdim=True)
        points.append(torch.stack([place % width, place // width], dim=2) + 0.5)
        labels.append(torch.where(highest > -torch.inf, NEGATIVE, PADDING))
    extent = to_device(selection.content_size[::-1], masks.device, torch.float32)
    return (torch.cat(points, dim=1) / extent).clamp(max=1.0), torch.cat(labels, dim=1)


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
