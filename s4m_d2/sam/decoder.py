"""SAM's mask decoder over prompts of several images at once, from segment-anything's own parts.

The library decodes the prompts of one image per call. Here every prompt names its image and
gathers that image's embedding, so that all prompts of a batch share one pass.
"""

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from torch import Tensor

PADDING_LABEL = -1
PIXEL_CENTER = 0.5  # segment-anything adds this to every point: pixel index -> pixel center


def transform_tokens(
    sam: Sam, embeddings: Tensor, image_index: Tensor, points: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """SAM's two-way transformer over point prompts of several images, in one pass.

    Args:
        embeddings: (B, C, S, S) image embeddings.
        image_index: (N,) long, the image of each prompt.
        points: (N, P, 2) continuous (x, y) in pixels of SAM's square input frame.
        labels: (N, P) 1 positive, 0 negative. No padding: see :func:`valid_point_groups`.

    Returns:
        Output tokens (N, T, C) and image tokens (N, C, S, S), which depend on the prompt.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # positions need full precision
        tokens = _prompt_tokens(sam, points.float(), labels)
        position = sam.prompt_encoder.get_dense_pe()
    image_tokens = embeddings + sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    image_tokens = image_tokens[image_index]
    position = position.expand_as(image_tokens)
    hidden, attended = sam.mask_decoder.transformer(image_tokens, position, tokens)
    return hidden, attended.transpose(1, 2).reshape(image_tokens.shape)


def predict_masks(
    sam: Sam, hidden: Tensor, features: Tensor, chosen: slice
) -> tuple[Tensor, Tensor]:
    """Mask logits (N, M, 4h, 4w) and predicted IoUs (N, M) of the chosen mask tokens.

    hidden: (N, T, C) output tokens of the transformer. features: (N, C, h, w) image tokens; a
    crop of the grid gives the same crop of the masks, because the upscaling is local.
    """
    decoder = sam.mask_decoder
    upscaled = decoder.output_upscaling(features)
    mask_tokens = hidden[:, 1 : 1 + decoder.num_mask_tokens].unbind(dim=1)
    heads = list(zip(decoder.output_hypernetworks_mlps, mask_tokens, strict=True))[chosen]
    kernels = torch.stack([head(token) for head, token in heads], dim=1)
    logits = (kernels @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    return logits, decoder.iou_prediction_head(hidden[:, 0])[:, chosen]


def _prompt_tokens(sam: Sam, points: Tensor, labels: Tensor) -> Tensor:
    """(N, T, C): IoU token, mask tokens, then the points and the library's padding token."""
    decoder = sam.mask_decoder
    learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    sparse, _ = sam.prompt_encoder(points=(points - PIXEL_CENTER, labels), boxes=None, masks=None)
    return torch.cat([learned.expand(len(points), -1, -1), sparse], dim=1)


def valid_point_groups(points: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Prompts grouped by their number of points, with the padding points removed.

    A padding point is no neutral token in SAM: it takes part in every attention. Prompts of equal
    length share a pass, so padding never reaches the decoder.

    Returns:
        (rows (n,), points (n, k, 2), labels (n, k)) for each k that occurs.
    """
    padding = labels == PADDING_LABEL
    order = torch.argsort(padding.int(), dim=1, stable=True)
    points = points.gather(1, order[..., None].expand_as(points))
    labels = labels.gather(1, order)
    counts = (~padding).sum(dim=1)
    groups = []
    for count in torch.unique(counts).tolist():
        rows = torch.nonzero(counts == count).squeeze(1)
        groups.append((rows, points[rows, :count], labels[rows, :count]))
    return groups
