"""SAM's mask decoder over prompts of several images at once, from the libraries' own parts.

The libraries decode the prompts of one image per call. Here every prompt names its image and
gathers that image's embedding, so that all prompts of a batch share one pass. SAM 2's decoder is
SAM's with two additions, which the same functions serve: a token that scores whether there is an
object at all, and finer feature maps that join the upscaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from s4m_d2.sam.image_tokens import ImageTokens


class PromptedDecoder(Protocol):
    """The two modules that answer prompts, under the names that segment-anything's Sam uses.

    Any: the libraries have no types.
    """

    @property
    def prompt_encoder(self) -> Any: ...

    @property
    def mask_decoder(self) -> Any: ...


def transform_tokens(
    sam: PromptedDecoder, embeddings: Tensor, image_index: Tensor, points: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """SAM's two-way transformer over point prompts of several images, in one pass.

    Args:
        embeddings: (B, C, S, S) image embeddings.
        image_index: (N,) long, the image of each prompt.
        points: (N, P, 2) continuous (x, y) in pixels of SAM's square input frame.
        labels: (N, P) 1 positive, 0 negative. No padding: see
            :func:`~s4m_d2.sam.prompt_groups.group_prompts`.

    Returns:
        Output tokens (N, T, C) and image tokens (N, C, S, S), which depend on the prompt.
    """
    image_tokens, position = _image_input(sam, embeddings)
    image_tokens = image_tokens[image_index]
    tokens = _prompt_tokens(sam, points, labels)
    hidden, attended = sam.mask_decoder.transformer(
        image_tokens, position.expand_as(image_tokens), tokens
    )
    return hidden, attended.transpose(1, 2).reshape(image_tokens.shape)


def share_image_tokens(sam: PromptedDecoder, embeddings: Tensor) -> ImageTokens:
    """What the prompts of images (B, C, S, S) share, for :func:`transform_image_tokens`."""
    return ImageTokens(sam.mask_decoder.transformer, *_image_input(sam, embeddings))


def transform_image_tokens(
    sam: PromptedDecoder, shared: ImageTokens, images: np.ndarray, points: Tensor, labels: Tensor
) -> Tensor:
    """The image tokens (N, C, S, S) alone of :func:`transform_tokens`, in less time.

    images: (N,) of which image each prompt is, ascending; on the host.
    """
    tokens = _prompt_tokens(sam, points, labels)
    present, counts = np.unique(images, return_counts=True)
    parts = [
        shared.after(image, part)
        for image, part in zip(present.tolist(), tokens.split(counts.tolist()), strict=True)
    ]
    attended = torch.cat(parts) if len(parts) > 1 else parts[0]
    return attended.transpose(1, 2).unflatten(2, sam.prompt_encoder.image_embedding_size)


def predict_masks(
    sam: PromptedDecoder,
    hidden: Tensor,
    features: Tensor,
    chosen: slice,
    finer_maps: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Mask logits (N, M, 4h, 4w) and predicted IoUs (N, M) of the chosen mask tokens.

    hidden: (N, T, C) output tokens of the transformer. features: (N, C, h, w) image tokens; a
    crop of the grid gives the same crop of the masks, because the upscaling is local.
    finer_maps: of each prompt's image, at 4 and 2 times the grid's resolution (SAM 2), or none.
    """
    decoder = sam.mask_decoder
    upscaled = _upscale(decoder, features, finer_maps)
    iou_token, *mask_tokens = hidden[:, _tokens_before_iou(decoder) :].unbind(dim=1)
    mask_tokens = mask_tokens[: decoder.num_mask_tokens]
    heads = list(zip(decoder.output_hypernetworks_mlps, mask_tokens, strict=True))[chosen]
    kernels = torch.stack([head(token) for head, token in heads], dim=1)
    logits = (kernels @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    return logits, decoder.iou_prediction_head(iou_token)[:, chosen]


def _upscale(decoder: Any, features: Tensor, finer_maps: Sequence[Tensor]) -> Tensor:
    """(N, C/8, 4h, 4w). A finer map is added to what the upscaling has at its resolution."""
    if not finer_maps:
        return decoder.output_upscaling(features)
    finest, finer = finer_maps
    to_finer, norm, activation, to_finest, last_activation = decoder.output_upscaling
    upscaled = activation(norm(to_finer(features) + finer))
    return last_activation(to_finest(upscaled) + finest)


def _image_input(sam: PromptedDecoder, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Image tokens (B, C, S, S) without a mask prompt, and the encoding of positions (1, C, S, S).

    Channels last: a token lies together in memory, and no projection has to copy it first.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # positions need full precision
        position = sam.prompt_encoder.get_dense_pe()
    image_tokens = embeddings + sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return (
        image_tokens.contiguous(memory_format=torch.channels_last),
        position.contiguous(memory_format=torch.channels_last),
    )


def _prompt_tokens(sam: PromptedDecoder, points: Tensor, labels: Tensor) -> Tensor:
    """(N, T, C): learned tokens, then the points and the library's padding token.

    The learned ones are the object score's, where there is one, the IoU's and the masks'. The
    points' are those of the libraries' prompt encoders, from the same tables: segment-anything's
    own function selects by masks, for which the host waits for the device.
    """
    decoder = sam.mask_decoder
    tokens = [decoder.iou_token.weight, decoder.mask_tokens.weight]
    if _tokens_before_iou(decoder):
        tokens.insert(0, decoder.obj_score_token.weight)
    encoder = sam.prompt_encoder
    with torch.autocast(points.device.type, enabled=False):  # positions need full precision
        positions = encoder.pe_layer.forward_with_coords(points.float(), encoder.input_image_size)
    kinds = torch.cat([table.weight for table in encoder.point_embeddings[:2]])  # 0 and 1
    clicks = positions + kinds[labels.long()]
    learned, padding = torch.cat(tokens), encoder.not_a_point_embed.weight
    count = len(points)
    return torch.cat([learned.expand(count, -1, -1), clicks, padding.expand(count, -1, -1)], dim=1)


def _tokens_before_iou(decoder: Any) -> int:
    return int(getattr(decoder, "pred_obj_scores", False))  # an attribute of SAM 2's decoder
