"""From queries to instances at the size of the original image."""

import math

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from s4m_d2.modeling.pixel_decoder import resize
from s4m_d2.semi.filters import are_duplicates
from s4m_d2.structures import RLEMasks, encode_masks, mask_areas, mask_boxes
from s4m_d2.transfers import to_device, to_host

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
    duplicate_iou: float = 1.0,
    rle_masks: bool = False,
) -> Instances:
    """Select the best (query, class) pairs of one image, ranked as in Mask2Former.

    The ``max_instances`` pairs with the highest class probability are kept; one query may appear
    with several classes. Score = class probability times the mean mask probability inside the
    mask. Only the masks of kept queries are upsampled, in chunks, so that the memory beside the
    result does not depend on their number.

    Args:
        pred_logits: (Q, K + 1), the last class being "no object".
        pred_masks: (Q, h, w) logits over the padded image.
        padded_size, image_size, output_size: (H, W) of the network's input, of the content at its
            top left, and of the result.
        max_instances: maximum number of pairs.
        duplicate_iou: of pairs of one class whose masks, at (h, w), have a larger IoU only the
            one with the highest score is kept; 1.0: all are.
        rle_masks: encode the masks of each chunk, so that the n dense masks are never in memory.

    Returns:
        Instances of ``output_size``, by descending class probability: ``pred_masks`` (n, H, W)
        bool, or :class:`RLEMasks`; ``pred_boxes`` (the masks' extents; zeros for an empty mask),
        ``scores``, ``pred_classes``.
    """
    class_scores, queries, classes = best_pairs(pred_logits, max_instances)
    if duplicate_iou < 1.0:
        logits = pred_masks[queries]
        inside = logits > 0
        scores = class_scores * _certainty(logits.sigmoid_(), inside)
        kept = ~are_duplicates(inside, scores, duplicate_iou, classes)
        class_scores, queries, classes = class_scores[kept], queries[kept], classes[kept]
    sizes = padded_size, image_size, output_size
    masks, boxes, mask_scores = _masks(pred_masks, queries, sizes, rle_masks)
    return Instances(
        output_size,
        pred_masks=masks,
        pred_boxes=Boxes(boxes),
        scores=class_scores * mask_scores,
        pred_classes=classes,
    )


def best_pairs(pred_logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class probability, query and class, (n,) each, of the best pairs, best first."""
    probabilities = pred_logits.float().softmax(-1)[:, :-1]
    scores, pairs = probabilities.flatten().topk(min(most, int(probabilities.numel())))
    return scores, pairs // probabilities.shape[1], pairs % probabilities.shape[1]


def largest_components(mask_logits: Tensor) -> Tensor:
    """Keep the largest connected component of (B, Q, h, w) masks; logits of others change sign.

    Components are 4-connected, so that they remain connected when enlarged. Synchronizes once.
    """
    [masks] = to_host(mask_logits.flatten(0, 1) > 0)
    others = np.zeros_like(masks)
    for mask, other in zip(masks, others, strict=True):
        count, regions, stats, _ = cv2.connectedComponentsWithStats(
            mask.view(np.uint8), connectivity=4
        )
        if count > 2:  # the background is one
            largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
            other[:] = mask & (regions != largest)
    is_other = to_device(others, mask_logits.device).view_as(mask_logits)
    return torch.where(is_other, -mask_logits, mask_logits)


def _masks(
    pred_masks: Tensor,
    queries: Tensor,
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    rle_masks: bool,
) -> tuple[Tensor | RLEMasks, Tensor, Tensor]:
    """Masks of n ``queries``, their boxes (n, 4) and mean probabilities inside (n,), in chunks.

    ``sizes``: of padded input, content and output. A query that occurs several times is upsampled
    (and encoded) once.
    """
    queries, row_of_pair = torch.unique(queries, return_inverse=True)
    rows, device = row_of_pair.tolist(), queries.device
    boxes, scores = torch.zeros(len(queries), 4, device=device), torch.zeros_like(queries).float()
    dense = torch.zeros(0 if rle_masks else len(rows), *sizes[2], dtype=torch.bool, device=device)
    rles: list[dict] = []
    chunk = max(1, CHUNK_PIXELS // max(math.prod(sizes[0]), math.prod(sizes[2])))
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        logits = resize(pred_masks[queries[part]][None].float(), sizes[0])
        logits = resize(logits[..., : sizes[1][0], : sizes[1][1]], sizes[2])[0]
        masks = logits > 0
        scores[part] = _certainty(logits.sigmoid_(), masks)
        del logits  # before those of the next chunk
        boxes[part] = mask_boxes(masks)
        if rle_masks:
            rles += encode_masks(masks)
            continue
        for pair, row in enumerate(rows):
            if start <= row < start + len(masks):
                dense[pair] = masks[row - start]
    found = RLEMasks([rles[row] for row in rows], sizes[2]) if rle_masks else dense
    return found, boxes[row_of_pair], scores[row_of_pair]


def _certainty(probabilities: Tensor, masks: Tensor) -> Tensor:
    """(N,) mean probability inside (N, H, W) masks; the probabilities are overwritten."""
    return probabilities.masked_fill_(~masks, 0).sum((1, 2)) / (mask_areas(masks) + _EPS)
