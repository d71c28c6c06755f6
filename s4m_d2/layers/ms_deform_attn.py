"""Multi-scale deformable attention (Deformable DETR): nothing to compile at installation."""

import functools
import logging
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4m_d2.errors import require
from s4m_d2.layers.deform_attn_plain import PlainDeformableSampling, Sizes
from s4m_d2.transfers import to_device

try:
    from s4m_d2.layers import deform_attn_triton
except ImportError:  # builds of torch without CUDA come without Triton
    deform_attn_triton = None  # type: ignore[assignment]

USE_TRITON = os.environ.get("S4M_D2_TRITON", "1") != "0"
logger = logging.getLogger(__name__)


def deformable_sampling(
    value: Tensor, level_sizes: Sizes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear look-ups in several feature maps.

    Uses ``grid_sample`` in an export, Triton kernels on a GPU, and plain PyTorch elsewhere, for
    float64, if Triton is missing or cannot compile, and without ``USE_TRITON`` (the environment
    variable ``S4M_D2_TRITON`` was 0 at import). Half-precision inputs are computed in float32.

    Args:
        value: (B, S, heads, C), the levels' cells in row-major order, one level after the other.
        level_sizes: (H, W) of each level; the products add up to S.
        locations: (B, Q, heads, levels, points, 2), (x, y) in [0, 1] over each feature map;
            outside the map is zero.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * C), in the dtype of ``value``.
    """
    if torch.onnx.is_in_onnx_export():
        return _grid_sampling(value, level_sizes, locations, weights)
    if USE_TRITON and _kernels_can_do(value, locations, weights):
        sample = deform_attn_triton.TritonDeformableSampling.apply
        return sample(value, level_sizes, locations, weights)
    dtype = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast(value.device.type, enabled=False):
        inputs = value.to(dtype), level_sizes, locations.to(dtype), weights.to(dtype)
        return PlainDeformableSampling.apply(*inputs).to(value.dtype)


def _kernels_can_do(*tensors: Tensor) -> bool:
    if deform_attn_triton is None:
        return False
    are_fit = all(x.is_cuda and x.dtype in deform_attn_triton.DTYPES for x in tensors)
    return are_fit and _kernels_compile(tensors[0].device)


@functools.cache
def _kernels_compile(device: torch.device) -> bool:
    """Try once, on minimal tensors, whether Triton works on this device."""
    value, locations = (torch.zeros(1, 1, 1, *more, device=device) for more in ((16,), (1, 1, 2)))
    sample = deform_attn_triton.TritonDeformableSampling.apply
    try:
        sample(value, [(1, 1)], locations, locations[..., 0])
    except Exception as error:  # no compiler, no headers, an unknown GPU, ...
        logger.warning(
            "Triton cannot compile its kernels here (%s). Deformable attention is computed in "
            "plain PyTorch, which takes longer. For the kernels install a C compiler, such as gcc, "
            "and Python's headers (python3-dev).",
            (str(error).splitlines() or [type(error).__name__])[0],
        )
        return False
    return True


def _cells(level_sizes: Sizes, device: torch.device) -> Tensor:
    """(levels, 2): width and height of each level."""
    if torch.onnx.is_in_onnx_export():  # where sizes are tensors, which must stay such
        sides = [torch.as_tensor(side) for size in level_sizes for side in size[::-1]]
        return torch.stack(sides).view(-1, 2)
    return to_device([(w, h) for h, w in level_sizes], device)


def _grid_sampling(value: Tensor, level_sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
    """``deformable_sampling`` by an operator that ONNX has."""
    batch, _, heads, channels = value.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # B · heads, Q, levels, points, 2
    factors = weights.transpose(1, 2).flatten(0, 1)[:, None]  # B · heads, 1, Q, levels, points
    maps = value.permute(0, 2, 3, 1).split([height * width for height, width in level_sizes], dim=3)
    found = [
        F.grid_sample(
            cells.reshape(batch * heads, channels, *size), grids[:, :, level], align_corners=False
        )
        for level, (cells, size) in enumerate(zip(maps, level_sizes, strict=True))
    ]
    sums = (torch.stack(found, dim=3) * factors).sum((3, 4))  # B · heads, C, Q
    return sums.reshape(batch, heads * channels, -1).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """Attention of a query to a few learned points around its reference point.

    Args:
        embed_dim: channels of queries and values, a multiple of ``num_heads``.
        num_levels: number of feature maps.
        num_heads: number of attention heads.
        num_points: points per head and feature map.
    """

    def __init__(self, *, embed_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        heads = f"a multiple of DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS, {num_heads}"
        require("MODEL.SEM_SEG_HEAD.CONVS_DIM", embed_dim, embed_dim % num_heads == 0, heads)
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
        """Set equal weights; head k's points are in direction 2πk/heads, 1, 2, … cells away."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * distances[:, None]  # heads, 1, points, 2
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(
        self, query: Tensor, reference_points: Tensor, value: Tensor, level_sizes: Sizes
    ) -> Tensor:
        """Compute the attention of ``query`` (B, Q, embed_dim), in its shape.

        Args:
            reference_points: (B or 1, Q, 2), (x, y) in [0, 1] over the feature maps.
            value: (B, S, embed_dim), the cells of all levels in row-major order.
            level_sizes: (H, W) of each level.
        """
        batch, queries, _ = query.shape
        shape = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        weights = self.attention_weights(query).view(*shape[:3], -1).softmax(-1).view(shape)
        cells = _cells(level_sizes, query.device)
        locations = reference_points[:, :, None, None, None] + offsets / cells[:, None]
        value = self.value_proj(value).unflatten(-1, (self.num_heads, -1))
        return self.output_proj(deformable_sampling(value, level_sizes, locations, weights))
