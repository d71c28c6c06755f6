"""The sinusoidal position encoding, and initial weights against fvcore's formula."""

import math
import warnings

import pytest
import torch
from torch import nn

from s4m_d2.layers import sine_position_encoding
from s4m_d2.modeling.pixel_decoder import xavier_fill


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
    assert torch.equal(ours.bias, torch.zeros(4))
    bound = (3 / (6 * 3 * 3)) ** 0.5
    assert 0.9 * bound < ours.weight.abs().max() <= bound
