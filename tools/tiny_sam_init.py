"""Where the tiny SAM starts: a vision transformer that begins as a local operator learns sooner.

Every value set here is trained afterwards, except the frequencies of the position encoding.
"""

from __future__ import annotations

import math

import torch
from segment_anything.modeling import Sam
from torch import nn

POSITION_SCALES = (-0.3, 0.6)  # powers of ten: from coarse to as fine as a few cells of the grid
POSITION_AMPLITUDE = 0.3
QUERY_BIAS = 4.0
WINDOW_SHARPNESS, GLOBAL_DISTANCE = 0.5, 3.0
MATCHING_GAIN = 3.0


@torch.no_grad()
def initialize_tiny_sam(sam: Sam, generator: torch.Generator) -> None:
    """Set the start values of the encoder's positions and attention and of the decoder's."""
    encoder = sam.image_encoder
    encoder.pos_embed.copy_(sine_positions(*encoder.pos_embed.shape[2:]))
    frequencies = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    frequencies.mul_(torch.logspace(*POSITION_SCALES, frequencies.shape[1]))
    for block in encoder.blocks:
        attend_to_neighbors(block.attn, GLOBAL_DISTANCE if block.window_size == 0 else 1.0)
    transformer = sam.mask_decoder.transformer
    match_positions(transformer.final_attn_token_to_image, generator)
    for layer in transformer.layers:
        match_positions(layer.cross_attn_token_to_image, generator)
        match_positions(layer.cross_attn_image_to_token, generator)


def sine_positions(side: int, channels: int) -> torch.Tensor:
    """(side, side, channels) sines and cosines of the row and of the column."""
    rates = math.pi / 2 * torch.logspace(0, math.log10(side / 2), channels // 4)
    phases = ((torch.arange(side) + 0.5) * 2 / side - 1)[:, None] * rates
    line = POSITION_AMPLITUDE * torch.cat([phases.sin(), phases.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2)


def attend_to_neighbors(attention: nn.Module, distance: float) -> None:
    """Let the four heads look right, left, down and up, by about ``distance`` cells.

    The relative positions of segment-anything enter as q . R[delta]. With a constant part u of q
    (the bias), u . R[delta] = -a (delta - offset)^2 + const for a table R of delta^2 and delta, as
    in ConViT (d'Ascoli et al., 2021).
    """
    heads = attention.num_heads
    width = attention.qkv.in_features // heads
    sharpness = WINDOW_SHARPNESS / distance**2
    bias = attention.qkv.bias.view(3, heads, width)
    bias.zero_()
    for table, slope in ((attention.rel_pos_h, 1), (attention.rel_pos_w, 2)):
        reach = table.shape[0] // 2
        delta = torch.arange(-reach, reach + 1).float()  # query minus key
        table[:, 0] = -sharpness * delta**2 / QUERY_BIAS
        table[:, slope] = 2 * sharpness * delta / QUERY_BIAS
    offsets = [(0.0, distance), (0.0, -distance), (distance, 0.0), (-distance, 0.0)]
    for head, (row, column) in enumerate(offsets):
        bias[0, head, :3] = QUERY_BIAS * torch.tensor([1.0, row, column])
    attention.qkv.weight.view(3, heads, width, -1)[0, :, :3] *= 0.1


def match_positions(attention: nn.Module, generator: torch.Generator) -> None:
    """Equal query and key projections: a click attends to the cells around it from the start."""
    shape = attention.q_proj.weight.shape
    weight = torch.randn(shape, generator=generator) * math.sqrt(MATCHING_GAIN / shape[1])
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.copy_(weight)
        projection.bias.zero_()
