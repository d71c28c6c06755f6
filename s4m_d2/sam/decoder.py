"""SAM's mask decoder over prompts of several images at once, from the libraries' own parts.

The libraries decode the prompts of one image per call. SAM 2's decoder is SAM's with two additions:
a token that scores whether there is an object at all, and finer feature maps that join the
upscaling. ``sam`` has the modules ``prompt_encoder`` and ``mask_decoder``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prompts(NamedTuple):
    """Prompts that are decoded together: equally many points each, and no padding."""

    images: np.ndarray  #: (N,) the image of each prompt, ascending, on the host
    image_index: Tensor  #: the same, long, on the device
    points: Tensor  #: (N, P, 2) continuous (x, y) in pixels of SAM's square frame
    labels: Tensor  #: (N, P) long: 1 positive, 0 negative, 2 and 3 a box's corners
    has_box: bool  #: whether all prompts have corners, or none
    masks: Tensor | None  #: (N, 4S, 4S) mask logits in the frame, or none

    def by_image(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each image and the rows of its prompts in ``values`` (N, ...)."""
        present, counts = np.unique(self.images, return_counts=True)
        return zip(present.tolist(), values.split(counts.tolist()), strict=True)


def predict_masks(
    sam: Any,
    image_tokens: Tensor,
    position: Tensor,
    finer_maps: Sequence[Tensor],
    prompts: Prompts,
) -> tuple[Tensor, Tensor]:
    """Mask logits (N, M, 4S, 4S) and predicted IoUs (N, M) of all mask tokens but the first, that
    of a single mask; prompts of several images in one pass.

    image_tokens, position: of :func:`image_input`. finer_maps: of the images, at 4 and 2 times the
    grid's resolution (SAM 2), or none.
    """
    decoder, image_tokens = sam.mask_decoder, image_tokens[prompts.image_index]
    if prompts.masks is not None:  # embedded in place of "no mask", which image_input added
        encoder = sam.prompt_encoder
        no_mask = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        image_tokens = image_tokens + (encoder.mask_downscaling(prompts.masks[:, None]) - no_mask)
    hidden, attended = decoder.transformer(
        image_tokens, position.expand_as(image_tokens), _prompt_tokens(sam, prompts)
    )
    features = attended.transpose(1, 2).reshape(image_tokens.shape)
    if finer_maps:  # each is added to what the upscaling has at its resolution
        finest, finer = (finer_map[prompts.image_index] for finer_map in finer_maps)
        to_finer, norm, activation, to_finest, last_activation = decoder.output_upscaling
        upscaled = activation(norm(to_finer(features) + finer))
        upscaled = last_activation(to_finest(upscaled) + finest)
    else:
        upscaled = decoder.output_upscaling(features)
    iou_token, _, *mask_tokens = hidden[:, _tokens_before_iou(decoder) :].unbind(dim=1)
    heads = zip(decoder.output_hypernetworks_mlps[1:], mask_tokens, strict=False)
    kernels = torch.stack([head(token) for head, token in heads], dim=1)
    logits = (kernels @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    return logits, decoder.iou_prediction_head(iou_token)[:, 1:]


def image_input(sam: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Image tokens (B, C, S, S) without a mask prompt, and the encoding of positions (1, C, S, S).

    Channels last: a token lies together in memory, and no projection has to copy it first.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # positions need more bits
        position = sam.prompt_encoder.get_dense_pe()
    image_tokens = embeddings + sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return (
        image_tokens.contiguous(memory_format=torch.channels_last),
        position.contiguous(memory_format=torch.channels_last),
    )


def _prompt_tokens(sam: Any, prompts: Prompts) -> Tensor:
    """(N, T, C): the learned tokens of the object score (SAM 2), the IoU and the masks; the points;
    and the libraries' padding token, which segment-anything leaves out beside a box.

    As of the libraries' prompt encoders; segment-anything's function selects by masks, which
    synchronizes.
    """
    decoder = sam.mask_decoder
    tokens = [decoder.iou_token.weight, decoder.mask_tokens.weight]
    is_sam2 = _tokens_before_iou(decoder) > 0
    if is_sam2:
        tokens.insert(0, decoder.obj_score_token.weight)
    encoder, points = sam.prompt_encoder, prompts.points
    with torch.autocast(points.device.type, enabled=False):  # positions need more bits
        positions = encoder.pe_layer.forward_with_coords(points.float(), encoder.input_image_size)
    kinds = torch.cat([table.weight for table in encoder.point_embeddings])  # of labels 0 to 3
    parts = [torch.cat(tokens).expand(len(points), -1, -1), positions + kinds[prompts.labels]]
    if is_sam2 or not prompts.has_box:
        parts.append(encoder.not_a_point_embed.weight.expand(len(points), -1, -1))
    return torch.cat(parts, dim=1)


def _tokens_before_iou(decoder: Any) -> int:
    return int(getattr(decoder, "pred_obj_scores", False))  # an attribute of SAM 2's decoder


class ImageTokens:
    """The image tokens after SAM's two-way transformer, in less time: structural distillation's.

    The prompts of an image share what does not depend on them, all projections of the first layer;
    in later layers the few tokens of a prompt are projected instead of its image tokens; and the
    last attention, which changes the prompt's tokens alone, is left out. The result is the same but
    for rounding.

    In shapes, S*S are the image tokens (cells), T the tokens of a prompt, C channels, h heads of d.
    """

    def __init__(self, sam: Any, embeddings: Tensor) -> None:
        embeddings, position = image_input(sam, embeddings)
        self.sam = sam
        self.layers = sam.mask_decoder.transformer.layers
        self.images = embeddings.flatten(2).transpose(1, 2)
        position = position.flatten(2).transpose(1, 2)
        located = self.images + position
        read, write = _attentions(self.layers[0])
        self.keys = _split(read, read.k_proj(located))
        self.values = _split(read, read.v_proj(self.images))
        self.queries = _split(write, write.q_proj(located))
        self.positions = [
            (_split(read, read.k_proj(position))[0], _split(write, write.q_proj(position))[0])
            for read, write in map(_attentions, self.layers[1:])
        ]

    def after(self, prompts: Prompts) -> Tensor:
        """(N, C, S, S) tokens after each prompt; mask prompts do not count."""
        tokens = _prompt_tokens(self.sam, prompts)
        attended = torch.cat([self._of_image(*part) for part in prompts.by_image(tokens)])
        return attended.transpose(1, 2).unflatten(2, self.sam.prompt_encoder.image_embedding_size)

    def _of_image(self, image: int, prompts: Tensor) -> Tensor:
        """(N, S*S, C) tokens of one image, each time after one of the prompts (N, T, C)."""
        layer, *others = self.layers
        read, write = _attentions(layer)
        tokens = _attend_to_each_other(layer, prompts, prompts)
        asked = _split(read, read.q_proj(tokens + prompts)).transpose(0, 1)  # (h, N, T, d)
        of_image = slice(image, image + 1)
        found = F.scaled_dot_product_attention(
            asked.flatten(1, 2)[None], self.keys[of_image], self.values[of_image]
        )
        found = found[0].view(asked.shape).permute(1, 2, 0, 3).flatten(2)
        tokens = _update(layer, tokens, read.out_proj(found))
        offered = _scaled(_split(write, write.k_proj(tokens + prompts)))
        cells = self.images[image].expand(len(prompts), -1, -1)
        cells = _write(layer, tokens, _products(offered, self.queries[image]), cells)
        for layer, (keys, queries) in zip(others, self.positions, strict=True):
            read, write = _attentions(layer)
            tokens = _attend_to_each_other(layer, tokens, prompts)
            asked = _scaled(_split(read, read.q_proj(tokens + prompts)))
            shares = _scores(asked, read.k_proj, cells, keys).softmax(dim=-1)
            tokens = _update(layer, tokens, _read(read, shares, cells))
            offered = _scaled(_split(write, write.k_proj(tokens + prompts)))
            cells = _write(layer, tokens, _scores(offered, write.q_proj, cells, queries), cells)
        return cells


def _attentions(layer: Any) -> tuple[Any, Any]:
    """From tokens to the image, and from the image to tokens."""
    return layer.cross_attn_token_to_image, layer.cross_attn_image_to_token


def _split(attention: Any, x: Tensor) -> Tensor:
    """(N, L, h*d) -> (N, h, L, d), of an attention with h heads."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _scaled(x: Tensor) -> Tensor:
    return x / x.shape[-1] ** 0.5


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
    folded = (tokens @ projection.weight.unflatten(0, (heads, -1))).flatten(1, 2)
    fixed = _products(tokens, positions).flatten(1, 2)
    return torch.baddbmm(fixed, folded, cells.transpose(1, 2)).unflatten(1, (heads, length))


def _read(attention: Any, shares: Tensor, cells: Tensor) -> Tensor:
    """(N, T, C) what tokens find that take shares (N, h, T, S*S) of cells (N, S*S, C)."""
    heads, length = shares.shape[1:3]
    mixed = (shares.flatten(1, 2) @ cells).unflatten(1, (heads, length))
    per_head = attention.v_proj.weight.unflatten(0, (heads, -1))  # (h, d, C)
    values = (mixed @ per_head.mT).transpose(1, 2).flatten(2)
    return attention.out_proj(values + attention.v_proj.bias)


def _write(layer: Any, tokens: Tensor, scores: Tensor, cells: Tensor) -> Tensor:
    """Cells (N, S*S, C) after attending to tokens (N, T, C) by scores (N, h, T, S*S)."""
    attention = layer.cross_attn_image_to_token
    heads = attention.num_heads
    # The shares of each head add up to 1, so each head brings its part of the bias.
    weight = attention.out_proj.weight.T.unflatten(0, (heads, -1))
    outputs = _split(attention, attention.v_proj(tokens)) @ weight
    outputs = (outputs + attention.out_proj.bias / heads).flatten(1, 2)
    shares = scores.softmax(dim=-2).flatten(1, 2)
    return layer.norm4(torch.baddbmm(cells, shares.mT, outputs))
