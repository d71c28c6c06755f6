"""Deformable attention: where heads look, and initialization. The look-up: test_deform_attn_*."""

import math

import pytest
import torch
from torch.nn import functional as F

from s4m_d2.errors import ConfigError
from s4m_d2.layers import MSDeformAttn


def test_fresh_heads_look_along_their_own_direction_with_equal_weights():
    layer = MSDeformAttn(embed_dim=8, num_levels=3, num_heads=4, num_points=2)
    offsets = layer.sampling_offsets.bias.view(4, 3, 2, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for distance in (1, 2):
        for level in range(3):
            torch.testing.assert_close(
                offsets[:, level, distance - 1], distance * directions, rtol=0, atol=1e-6
            )
    assert not layer.sampling_offsets.weight.any()
    assert not layer.attention_weights.weight.any() and not layer.attention_weights.bias.any()
    assert layer.value_proj.weight.std() > 0.1 and not layer.value_proj.bias.any()


def test_offsets_are_in_cells_of_each_level():
    """With identity projections and one point, a head reads the cell its offset points at."""
    sizes = [(3, 4), (6, 8)]
    layer = MSDeformAttn(embed_dim=2, num_levels=2, num_heads=1, num_points=1)
    with torch.no_grad():
        for projection in (layer.value_proj, layer.output_proj):
            projection.weight.copy_(torch.eye(2))
        layer.sampling_offsets.bias.copy_(torch.tensor([1.0, 0, 0, -2.0]))
        layer.attention_weights.bias.copy_(torch.tensor([math.log(3.0), 0]))
    value = torch.randn(1, 12 + 48, 2)
    center = torch.tensor([[[1.5 / 4, 1.5 / 3]]])  # cell (row 1, column 1) of the first level
    output = layer(torch.zeros(1, 1, 2), center, value, sizes)
    first = value[0, :12].view(3, 4, 2)[1, 2]
    place = torch.tensor([[[[1.5 / 4, 1.5 / 3 - 2 / 6]]]])
    finer = value[:, 12:].mT.view(1, 2, 6, 8)
    second = F.grid_sample(finer, 2 * place - 1, align_corners=False).flatten()
    torch.testing.assert_close(output[0, 0], 0.75 * first + 0.25 * second)


def test_channels_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="CONVS_DIM"):
        MSDeformAttn(embed_dim=6, num_levels=1, num_heads=4, num_points=1)
