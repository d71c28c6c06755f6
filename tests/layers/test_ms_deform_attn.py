"""Deformable attention: where heads look (the look-up: test_deform_attn_*); encoded positions."""

import math
import warnings

import pytest
import torch
from torch import nn

from s4m_d2.errors import ConfigError
from s4m_d2.layers import MSDeformAttn, sine_position_encoding
from s4m_d2.modeling.pixel_decoder import xavier_fill


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


def test_channels_that_the_heads_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="CONVS_DIM"):
        MSDeformAttn(embed_dim=6, num_levels=1, num_heads=4, num_points=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 2)])
def test_equals_the_formula_cell_by_cell(size):
    channels, (height, width) = 12, size
    code = sine_position_encoding(size, channels)
    assert code.shape == (channels, height, width) and code.dtype == torch.float32
    half = channels // 2
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                position, length = (row, height) if channel < half else (column, width)
                index = channel % half
                angle = (position + 1) / length * 2 * math.pi / 10000 ** (2 * (index // 2) / half)
                expected = math.cos(angle) if index % 2 else math.sin(angle)
                assert code[channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_the_fill_is_that_of_mask2formers_heads():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore.nn scripts functions on import
        from fvcore.nn.weight_init import c2_xavier_fill
    ours, theirs = nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        xavier_fill(ours)
        torch.manual_seed(0)
        c2_xavier_fill(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
