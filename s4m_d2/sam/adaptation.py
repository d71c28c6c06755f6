"""Fine-tuning a SAM on a few labeled images, class-agnostic; not part of the paper.

The mask decoder and the prompt encoder are trained, and an image encoder that is small.
"""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from s4m_d2.sam.backend import EncodedImages
from s4m_d2.sam.point_prompts import PointPromptBackend
from s4m_d2.transfers import to_device

logger = logging.getLogger(__name__)

MAX_BALANCE = 12  # times that a pixel of a small target counts more than its background, or less
ALL_MASKS_WEIGHT, QUALITY_WEIGHT = 0.05, 4.0
BASE_LR, LARGE_LR = 1e-3, 1e-4  # with an encoder that is trained, and with one that is not
WEIGHT_DECAY, NORM_CLIP, WARMUP_STEPS = 0.01, 1.0, 20
CACHED_BATCHES = 32  # whose embeddings are kept, where the encoder is not trained
MOST_PROMPTS = 8  # of an image in a step
MIN_AREA = 8  # of a target, px of SAM's masks
SMALL_ENCODER = 10_000_000  # parameters, up to which an image encoder is trained too
FROZEN = "pyramid."  # of the packaged encoder: ImageNet's part
LOG_PERIOD = 50

View = tuple[Tensor, Tensor]  # (3, H, W) uint8 RGB, and (N, H, W) bool masks, at least one


def adapt_sam(
    backend: PointPromptBackend,
    batches: Iterator[Sequence[View]],
    *,
    iterations: int,
    clicks: int,
    rng: np.random.Generator,
) -> None:
    """Train a SAM to answer clicks (:func:`draw_clicks`) in masks of views, then freeze it again.

    The learning rate falls linearly to zero. Of an encoder that is not trained, only the first
    batches are read, and encoded once.
    """
    encoder = [p for n, p in backend.image_encoder.named_parameters() if not n.startswith(FROZEN)]
    if sum(p.numel() for p in backend.image_encoder.parameters()) > SMALL_ENCODER:
        encoder = []
    decoder = backend.decoder.prompt_encoder, backend.decoder.mask_decoder
    trained = [*encoder, *(p for module in decoder for p in module.parameters())]
    rate = BASE_LR if encoder else LARGE_LR
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY)
    cache: list[tuple[EncodedImages, list[Tensor]]] = []
    for parameter in trained:
        parameter.requires_grad_(True)
    for step in range(iterations):
        factor = min((step + 1) / WARMUP_STEPS, 1.0) * (1 - step / iterations)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        if encoder or len(cache) < CACHED_BATCHES:
            views = next(batches)
            images = ImageList.from_tensors([image for image, _ in views])
            with torch.set_grad_enabled(bool(encoder)):
                encoded = backend.encode(images.tensor, images.image_sizes)
            batch = encoded, [masks for _, masks in views]
            if not encoder:
                cache.append(batch)
        else:
            batch = cache[rng.integers(len(cache))]
        loss = _loss(backend, *batch, clicks, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, NORM_CLIP)
        optimizer.step()
        if (step + 1) % LOG_PERIOD == 0:
            logger.info("SAM's adaptation: iteration %d, loss %.3f", step + 1, loss.item())
    backend.sam.requires_grad_(False)


def draw_clicks(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) float32 centers of different pixels of (H, W) bool: (x, y) in [0, 1] over it.

    As refinement draws them in a teacher's mask that is everywhere equally certain; where the mask
    has fewer pixels, some twice.
    """
    places = np.argwhere(mask)
    chosen = places[rng.choice(len(places), size=count, replace=len(places) < count)]
    return ((chosen + 0.5) / mask.shape)[:, ::-1].astype(np.float32)


def _loss(
    backend: PointPromptBackend,
    encoded: EncodedImages,
    masks: Sequence[Tensor],
    clicks: int,
    rng: np.random.Generator,
) -> Tensor:
    """Of the best answer to each prompt, and of how the answers are rated."""
    chosen = [of_image[rng.permutation(len(of_image))[:MOST_PROMPTS]] for of_image in masks]
    points = [
        torch.from_numpy(np.stack([draw_clicks(mask.numpy(), clicks, rng) for mask in of_image]))
        for of_image in chosen
    ]
    side = 4 * backend.grid_side  # of the square frame at the resolution of SAM's masks
    total = torch.zeros((), device=backend.device)
    outputs = backend.prompt(encoded, points)
    for output, of_image, size in zip(outputs, chosen, encoded.image_sizes, strict=True):
        width, height = (max(round(scale * side), 1) for scale in backend.grid_scale(size))
        target = F.interpolate(of_image[:, None].float(), (height, width), mode="area")[:, 0] > 0.5
        target = to_device(target, backend.device)
        losses, ious = mask_losses(output.mask_logits[..., :height, :width], target)
        losses = losses.amin(dim=1) + ALL_MASKS_WEIGHT * losses.mean(dim=1)
        rating = (output.iou_predictions - ious).square().mean(dim=1)
        large = target.flatten(1).sum(dim=1) >= MIN_AREA
        losses = (losses + QUALITY_WEIGHT * rating) * large
        total = total + losses.sum() / large.sum().clamp(min=1)
    return total / len(masks)


def mask_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced cross-entropy plus dice of each answer, (N, M), and its true IoU, (N, M).

    Args:
        logits: (N, M, h, w), M answers to each prompt.
        targets: (N, h, w) bool.
    """
    target = targets.float()[:, None].expand_as(logits)
    inside = target.sum(dim=(2, 3)).clamp(min=1)
    balance = (target[0, 0].numel() / inside - 1).clamp(1 / MAX_BALANCE, MAX_BALANCE)
    balance = balance[..., None, None]
    weight = 1 + (balance - 1) * target
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = (entropy * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * target).sum(dim=(2, 3)) + 1) / ((chance + target).sum(dim=(2, 3)) + 1)
    predicted = (logits > 0).float()
    overlap = (predicted * target).sum(dim=(2, 3))
    return 2 * entropy + dice, overlap / (predicted.sum(dim=(2, 3)) + inside - overlap)
