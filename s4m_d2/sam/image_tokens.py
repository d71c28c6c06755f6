"""SAM's image tokens after the two-way transformer, as structural distillation asks for them.

The libraries' transformer repeats an image for each of its prompts. Here the prompts of an image
share what does not depend on them, all projections of the first layer; in later layers the few
tokens of a prompt are projected instead of its image tokens; and the last attention, which changes
the prompt's tokens alone, is left out. The result is the same but for rounding. SAM's parts and
SAM 2's have the same names.

In shapes, S*S are the image tokens (cells), T the tokens of a prompt, C channels, h heads of d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageTokens:
    """What all prompts of an image share.

    Args:
        transformer: a library's ``TwoWayTransformer``.
        embeddings: (B, C, S, S) what the transformer gets as its images.
        position: (1, C, S, S) the encoding of its positions.
    """

    def __init__(self, transformer: Any, embeddings: Tensor, position: Tensor) -> None:
        self.layers = transformer.layers
        self.images = embeddings.flatten(2).transpose(1, 2)
        position = position.flatten(2).transpose(1, 2)
        located = self.images + position
        read, write, heads = _attentions(self.layers[0])
        self.keys = _split(read.k_proj(located), heads)
        self.values = _split(read.v_proj(self.images), heads)
        self.queries = _split(write.q_proj(located), heads)
        self.positions = []
        for layer in self.layers[1:]:
            read, write, heads = _attentions(layer)
            projected = read.k_proj(position), write.q_proj(position)
            self.positions.append([_split(x, heads)[0] for x in projected])

    def after(self, image: int, prompts: Tensor) -> Tensor:
        """(N, S*S, C) tokens of one image, each time after one of the prompts (N, T, C)."""
        layer, *others = self.layers
        read, write, heads = _attentions(layer)
        tokens = _attend_to_each_other(layer, prompts, prompts)
        asked = _split(read.q_proj(tokens + prompts), heads).transpose(0, 1)  # (h, N, T, d)
        of_image = slice(image, image + 1)
        found = F.scaled_dot_product_attention(
            asked.flatten(1, 2)[None], self.keys[of_image], self.values[of_image]
        )
        found = found[0].view(asked.shape).permute(1, 2, 0, 3).flatten(2)
        tokens = _update(layer, tokens, read.out_proj(found))
        offered = _scaled(_split(write.k_proj(tokens + prompts), heads))
        cells = self.images[image].expand(len(prompts), -1, -1)
        cells = _write(layer, tokens, _products(offered, self.queries[image]), cells)
        for layer, (keys, queries) in zip(others, self.positions, strict=True):
            read, write, heads = _attentions(layer)
            tokens = _attend_to_each_other(layer, tokens, prompts)
            asked = _scaled(_split(read.q_proj(tokens + prompts), heads))
            shares = _scores(asked, read.k_proj, cells, keys).softmax(dim=-1)
            tokens = _update(layer, tokens, _read(read, shares, cells))
            offered = _scaled(_split(write.k_proj(tokens + prompts), heads))
            cells = _write(layer, tokens, _scores(offered, write.q_proj, cells, queries), cells)
        return cells


def _attentions(layer: Any) -> tuple[Any, Any, int]:
    """From tokens to the image, from the image to tokens, and their number of heads."""
    read, write = layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
    return read, write, read.num_heads


def _split(x: Tensor, heads: int) -> Tensor:
    """(N, L, h*d) -> (N, h, L, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _scaled(x: Tensor) -> Tensor:
    return x / x.shape[-1] ** 0.5


def _per_head(linear: nn.Linear, heads: int) -> Tensor:
    """(h, d, C) weights of a projection to h*d channels."""
    return linear.weight.unflatten(0, (heads, -1))


def _attend_to_each_other(layer: Any, tokens: Tensor, prompts: Tensor) -> Tensor:
    if layer.skip_first_layer_pe:
        return layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))
    located = tokens + prompts
    return layer.norm1(tokens + layer.self_attn(q=located, k=located, v=tokens))


def _update(layer: Any, tokens: Tensor, found: Tensor) -> Tensor:
    """Prompt tokens (N, T, C) after what they found in the image, (N, T, C)."""
    tokens = layer.norm2(tokens + found)
    return layer.norm3(tokens + layer.mlp(tokens))


def _products(tokens: Tensor, cells: Tensor) -> Tensor:
    """(N, h, T, S*S) of each prompt's tokens (N, h, T, d) with shared cells (h, S*S, d)."""
    count, _, length, _ = tokens.shape
    together = tokens.transpose(0, 1).flatten(1, 2) @ cells.transpose(1, 2)
    return together.unflatten(1, (count, length)).transpose(0, 1)


def _scores(tokens: Tensor, projection: nn.Linear, cells: Tensor, positions: Tensor) -> Tensor:
    """(N, h, T, S*S) products of tokens (N, h, T, d) with the projection of cells (N, S*S, C).

    positions: (h, S*S, d) the projection, with its bias, of what is added to the cells.
    """
    heads, length = tokens.shape[1:3]
    folded = (tokens @ _per_head(projection, heads)).flatten(1, 2)
    fixed = _products(tokens, positions).flatten(1, 2)
    return torch.baddbmm(fixed, folded, cells.transpose(1, 2)).unflatten(1, (heads, length))


def _read(attention: Any, shares: Tensor, cells: Tensor) -> Tensor:
    """(N, T, C) what tokens find that take shares (N, h, T, S*S) of cells (N, S*S, C)."""
    heads, length = shares.shape[1:3]
    mixed = (shares.flatten(1, 2) @ cells).unflatten(1, (heads, length))
    values = (mixed @ _per_head(attention.v_proj, heads).mT).transpose(1, 2).flatten(2)
    return attention.out_proj(values + attention.v_proj.bias)


def _write(layer: Any, tokens: Tensor, scores: Tensor, cells: Tensor) -> Tensor:
    """Cells (N, S*S, C) after attending to tokens (N, T, C) by scores (N, h, T, S*S)."""
    attention = layer.cross_attn_image_to_token
    heads = attention.num_heads
    values = _split(attention.v_proj(tokens), heads)
    # The shares of each head add up to 1, so each head brings its part of the bias.
    outputs = values @ attention.out_proj.weight.T.unflatten(0, (heads, -1))
    outputs = (outputs + attention.out_proj.bias / heads).flatten(1, 2)
    shares = scores.softmax(dim=-2).flatten(1, 2)
    return layer.norm4(torch.baddbmm(cells, shares.mT, outputs))
