"""Reading feature maps at points, and choosing the points.

Points are (x, y) in [0, 1] x [0, 1] over the whole map, (0, 0) its top left corner.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def point_sample(input: Tensor, point_coords: Tensor, **kwargs: Any) -> Tensor:
    """Sample (N, C, H, W) maps bilinearly at points.

    point_coords: (N, P, 2), which gives (N, C, P), or (N, H', W', 2), which gives (N, C, H', W').
    kwargs: F.grid_sample's; outside of the map lie zeros, unless `padding_mode` says otherwise.
    """
    as_list = point_coords.dim() == 3
    grid = point_coords.unsqueeze(2) if as_list else point_coords
    sampled = F.grid_sample(input, 2.0 * grid - 1.0, **kwargs)
    return sampled.squeeze(3) if as_list else sampled


def get_uncertain_point_coords_with_randomness(
    coarse_logits: Tensor,
    uncertainty_func: Callable[[Tensor], Tensor],
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
) -> Tensor:
    """Draw points for each map, most of them where it is uncertain.

    Of `num_points * oversample_ratio` uniform points the most uncertain ones make up the share
    `importance_sample_ratio` of the result; uniform points fill up the rest.

    coarse_logits: (N, C, H, W). uncertainty_func: (N, C, P) logits -> (N, 1, P).
    Returns (N, num_points, 2) points, from torch's global generator.
    """
    assert oversample_ratio >= 1
    assert 0 <= importance_sample_ratio <= 1
    count, device = len(coarse_logits), coarse_logits.device
    candidates = torch.rand(count, int(num_points * oversample_ratio), 2, device=device)
    # The uncertainty of the sampled logits: sampling an uncertainty map would miss the points
    # between two confident pixels of opposite sign.
    logits = point_sample(coarse_logits, candidates, align_corners=False)
    num_uncertain = int(importance_sample_ratio * num_points)
    top = uncertainty_func(logits)[:, 0].topk(num_uncertain, dim=1).indices
    points = candidates.gather(1, top[..., None].expand(-1, -1, 2))
    if num_uncertain == num_points:
        return points
    fill = torch.rand(count, num_points - num_uncertain, 2, device=device)
    return torch.cat((points, fill), dim=1)
