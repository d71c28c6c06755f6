"""Deformable attention against a literal loop, gradients and initialization."""

import math

import pytest
import torch
from level_by_level import random_inputs

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.layers import MSDeformAttn, deformable_sampling


def bilinear(grid, x, y):
    """Value (C,) of ``grid`` (H, W, C) at pixel coordinates, zero outside."""
    height, width, channels = grid.shape
    value = torch.zeros(channels, dtype=grid.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * grid[row, column]
    return value


def literal_sampling(value, level_sizes, locations, weights):
    batch, queries, heads, _, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=value.dtype)
    start = 0
    for level, (height, width) in enumerate(level_sizes):
        end = start + height * width
        for b in range(batch):
            for h in range(heads):
                grid = value[b, start:end, h].view(height, width, -1)
                for q in range(queries):
                    for p in range(points):
                        x, y = locations[b, q, h, level, p].tolist()
                        found = bilinear(grid, x * width - 0.5, y * height - 0.5)
                        output[b, q, h] += weights[b, q, h, level, p] * found
        start = end
    return output.flatten(2)


LEVELS = [[(1, 1)], [(4, 6)], [(2, 3), (5, 1), (4, 7)]]


@pytest.mark.parametrize("level_sizes", LEVELS, ids=str)
def test_equals_literal_loop_inside_and_outside_the_maps(level_sizes):
    value, locations, weights = random_inputs(level_sizes)
    expected = literal_sampling(value, level_sizes, locations, weights)
    actual = deformable_sampling(value, level_sizes, locations, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


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
    second = bilinear(value[0, 12:].view(6, 8, 2), 1.5 / 4 * 8 - 0.5, 1.5 / 3 * 6 - 0.5 - 2)
    torch.testing.assert_close(output[0, 0], 0.75 * first + 0.25 * second)


def test_sizes_that_do_not_fit_are_refused():
    layer = MSDeformAttn(embed_dim=4, num_levels=1, num_heads=2, num_points=1)
    with pytest.raises(InputError, match="do not add up to 5"):
        layer(torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), torch.zeros(1, 5, 4), [(2, 2)])
    with pytest.raises(ConfigError, match="CONVS_DIM"):
        MSDeformAttn(embed_dim=6, num_levels=1, num_heads=4, num_points=1)
