"""Multi-scale deformable attention (Deformable DETR) in plain PyTorch, nothing to compile."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4m_d2.errors import ConfigError, InputError

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def deformable_sampling(
    value: Tensor,
    level_sizes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear look-ups in several feature maps.

    Half-precision inputs are computed in float32. One ``grid_sample`` a level is used because it
    was the fastest on the CPU over forward and backward, ahead of gathering the four corners and
    of ``embedding_bag``.

    Args:
        value: (B, S, heads, C), the levels' cells in row-major order, one level after the other.
        level_sizes: (H, W) of each level; the products add up to S.
        locations: (B, Q, heads, levels, points, 2), (x, y) in [0, 1] over each feature map; what
            lies outside counts as zero.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * C), in the dtype of ``value``.
    """
    dtype = value.dtype
    if dtype in _LOW_PRECISION:
        value, locations, weights = value.float(), locations.float(), weights.float()
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # B·heads, Q, levels, points, 2
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # B·heads, 1, Q, levels, points
    levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in level_sizes], dim=-1)
    output = value.new_zeros(batch * heads, channels, queries)
    for index, (level, size) in enumerate(zip(levels, level_sizes, strict=True)):
        sampled = F.grid_sample(
            level.unflatten(-1, size), grids[:, :, index], mode="bilinear", align_corners=False
        )
        output = output + (sampled * weights[:, :, :, index]).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(dtype)


class MSDeformAttn(nn.Module):
    """Attention in which a query looks at a few learnt points around its reference point.

    Args:
        embed_dim: channels of queries and values, a multiple of ``num_heads``.
        num_levels: number of feature maps.
        num_heads: number of attention heads.
        num_points: points that a head samples on each feature map.
    """

    def __init__(self, *, embed_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {embed_dim}; it must be a multiple of the "
                f"{num_heads} heads of DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS"
            )
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal weights; head k's points lie in direction 2πk/heads, 1, 2, … cells away."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * distances[:, None]  # heads, 1, points, 2
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        level_sizes: list[tuple[int, int]],
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, embed_dim).
            reference_points: (B or 1, Q, 2), (x, y) in [0, 1] over the feature maps.
            value: (B, S, embed_dim), the cells of all levels in row-major order.
            level_sizes: (H, W) of each level.

        Returns:
            (B, Q, embed_dim).

        Raises:
            InputError: if the levels' sizes do not add up to the length of ``value``.
        """
        if sum(height * width for height, width in level_sizes) != value.shape[1]:
            raise InputError(f"levels {level_sizes} do not add up to {value.shape[1]} values")
        batch, queries, _ = query.shape
        shape = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        cells = torch.tensor([(w, h) for h, w in level_sizes], device=query.device)  # levels, 2
        locations = reference_points[:, :, None, None, None] + offsets / cells[:, None]
        value = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        return self.output_proj(deformable_sampling(value, level_sizes, locations, weights))
