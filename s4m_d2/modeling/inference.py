"""From queries to instances at the size of the original image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

CHUNK_PIXELS = 1 << 24  # mask pixels that are upsampled together: 64 MiB of float32
_EPS = 1e-6


def instance_inference(
    pred_logits: Tensor,
    pred_masks: Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    max_instances: int,
) -> Instances:
    """The best (query, class) pairs of one image, as Mask2Former ranks them.

    The ``max_instances`` pairs with the highest class probability are kept; one query may appear
    with several classes. Score = class probability times the mean mask probability inside the
    mask. Only the masks of kept queries are upsampled, a few at a time.

    Args:
        pred_logits: (Q, K + 1), the last class being "no object".
        pred_masks: (Q, h, w) logits over the padded image.
        padded_size: (H, W) of the network's input.
        image_size: (H, W) of the content, at the top left of the input.
        output_size: (H, W) of the result.
        max_instances: how many pairs to keep at most.

    Returns:
        Instances of ``output_size``, by descending class probability: ``pred_masks`` (n, H, W)
        bool, ``pred_boxes`` (the masks' extents; zeros for an empty mask), ``scores``,
        ``pred_classes``.
    """
    probabilities = pred_logits.float().softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    count = min(max_instances, probabilities.numel())
    class_scores, pairs = probabilities.flatten().topk(count)
    kept, query_of_pair = torch.unique(pairs // num_classes, return_inverse=True)
    masks, mask_scores = _upsample(pred_masks[kept], padded_size, image_size, output_size)
    boxes = BitMasks(masks).get_bounding_boxes().tensor.to(masks.device)
    return Instances(
        output_size,
        pred_masks=masks[query_of_pair],
        pred_boxes=Boxes(boxes[query_of_pair]),
        scores=class_scores * mask_scores[query_of_pair],
        pred_classes=pairs % num_classes,
    )


def _upsample(
    mask_logits: Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Binary masks (N, H, W) of the output and their mean probability inside, (N,)."""
    masks = torch.zeros(
        (len(mask_logits), *output_size), dtype=torch.bool, device=mask_logits.device
    )
    scores = torch.zeros(len(mask_logits), device=mask_logits.device)
    largest = max(padded_size[0] * padded_size[1], output_size[0] * output_size[1])
    chunk = max(1, CHUNK_PIXELS // largest)
    for start in range(0, len(mask_logits), chunk):
        part = slice(start, start + chunk)
        logits = _resize(mask_logits[None, part].float(), padded_size)
        logits = _resize(logits[..., : image_size[0], : image_size[1]], output_size)[0]
        masks[part] = logits > 0
        inside = logits.sigmoid().mul_(masks[part]).sum((1, 2))
        scores[part] = inside / (masks[part].sum((1, 2)) + _EPS)
    return masks, scores


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
