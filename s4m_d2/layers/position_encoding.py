"""Positions on a feature map: centers of cells, and their sinusoidal encoding (DETR)."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0  # ratio between the longest and the shortest wavelength
_EPS = 1e-6


def cell_centers(size: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """(H·W, 2) centers (x, y) of the cells of an (H, W) map in [0, 1], row by row."""
    y, x = ((torch.arange(side, device=device) + 0.5) / side for side in size)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1)


def sine_position_encoding(
    size: tuple[int, int], channels: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Encode every cell of a feature map of ``size`` (H, W): (channels, H, W) float32.

    Rows and columns are counted from 1 and scaled so that the last one is at 2π. The first half of
    the channels, a multiple of 4, encodes y, the second x; even ones are sines, odd ones cosines.
    """
    height, width = size
    frequencies = torch.arange(channels // 4, dtype=torch.float32, device=device)
    frequencies = TEMPERATURE ** (2 * frequencies / (channels // 2))
    code_y = _encode_axis(height, frequencies)
    code_x = _encode_axis(width, frequencies)
    return torch.cat(
        [code_y[:, :, None].expand(-1, -1, width), code_x[:, None, :].expand(-1, height, -1)]
    )


def _encode_axis(length: int, frequencies: Tensor) -> Tensor:
    """(2F, length): sine and cosine of each frequency, interleaved."""
    steps = torch.arange(1, length + 1, dtype=torch.float32, device=frequencies.device)
    angles = steps / (length + _EPS) * (2 * math.pi) / frequencies[:, None]
    return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1)
