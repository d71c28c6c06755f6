"""The sinusoidal position encoding."""

import math

import pytest
import torch

from s4m_d2.layers import sine_position_encoding


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
