"""The straightforward forms of the labeling: loops over images, masks and tensors.

Nothing but the benchmark uses them. They take the project's inputs and give its results; they are
written from the method's definition for this comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor, nn

from s4m_d2.structures import PseudoLabels


def mask_points(
    mask_logits: Tensor,
    masks: Tensor,
    content_size: tuple[float, float],
    num_points: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Clicks drawn on the host, mask by mask: P(pixel) ∝ softmax of the logits inside the mask.

    Each draw is one from all pixels of the map, most of which have no weight.

    Args:
        mask_logits, masks: (N, h, w).
        content_size: (h', w') in pixels of the masks.

    Returns:
        (N, P, 2) points (x, y) normalized to the content and (N, P) labels, -1 where a mask has too
        few pixels; on the device of the masks.
    """
    points = np.zeros((len(masks), num_points, 2), np.float32)
    labels = np.full((len(masks), num_points), -1)
    height, width = content_size
    for row, (logits, mask) in enumerate(zip(mask_logits, masks, strict=True)):
        inside = mask.cpu().numpy()
        weights = np.where(inside, logits.cpu().numpy().astype(np.float64), -np.inf).ravel()
        weights = np.exp(weights - weights.max())
        count = min(num_points, int(inside.sum()))
        chosen = rng.choice(weights.size, count, replace=False, p=weights / weights.sum())
        y, x = np.divmod(chosen, mask.shape[1])
        pixels = np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=1)
        points[row, :count] = np.minimum(pixels, 1.0)
        labels[row, :count] = 1
    return torch.from_numpy(points).to(masks.device), torch.from_numpy(labels).to(masks.device)


def best_masks(mask_logits: Tensor, ious: Tensor) -> Tensor:
    """(N, h, w): of (N, M, h, w) masks those of the highest IoU, one after the other."""
    rows = [logits[int(iou.argmax())] for logits, iou in zip(mask_logits, ious, strict=True)]
    return torch.stack(rows)


def image_masks(upscale, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool masks at image size, resized one at a time."""
    return torch.cat([upscale(logits[None], image_size) > 0 for logits in mask_logits])


@dataclass(frozen=True)
class Exchange:
    """One direction of an ARP pair: where each instance of ``source`` goes on ``base``.

    ``draws`` (N, 3) in [0, 1): scale, x and y of each pasted instance; None: pasted in place.
    """

    source: int
    base: int
    draws: Tensor | None = None


def exchange_instances(
    images: Sequence[Tensor],
    labels: Sequence[PseudoLabels],
    exchanges: Iterable[Exchange],
    min_area: float,
    scale_range: tuple[float, float],
) -> tuple[list[Tensor], list[PseudoLabels]]:
    """ARP with a loop over masks."""
    new_images, new_labels = list(images), list(labels)
    for exchange in exchanges:
        source, base = exchange.source, exchange.base
        image, found = images[base].clone(), labels[base]
        masks = [mask.clone() for mask in found.masks]
        classes, scores = list(found.labels), list(found.scores)
        pasted = 0
        for label, mask, score in zip(
            labels[source].labels, labels[source].masks, labels[source].scores, strict=True
        ):
            if mask.sum().item() < min_area:
                continue
            pixels = images[source]
            if exchange.draws is not None:
                pixels, mask = place(pixels, mask, exchange.draws[pasted], scale_range)
            image = torch.where(mask, pixels, image)
            for other in masks:
                other[mask] = False
            masks, classes, scores = [*masks, mask.clone()], [*classes, label], [*scores, score]
            pasted += 1
        if pasted:
            new_images[base], new_labels[base] = image, _disjoint(masks, classes, scores, pasted)
    return new_images, new_labels


def _disjoint(masks: list[Tensor], classes: list, scores: list, pasted: int) -> PseudoLabels:
    """Later masks over earlier ones; the pasted ones have cut the others already."""
    own = len(masks) - pasted
    for later in range(own):
        for earlier in range(later):
            masks[earlier][masks[later]] = False
    kept = [index for index, mask in enumerate(masks) if mask.any()]
    return PseudoLabels(
        torch.stack([classes[index] for index in kept]),
        torch.stack([masks[index] for index in kept]),
        torch.stack([scores[index] for index in kept]),
    )


def place(
    image: Tensor, mask: Tensor, draw: Tensor, scale_range: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """An image (3, H, W) and one of its masks (H, W), scaled and moved as ``draw`` (3,) says."""
    height, width = mask.shape
    scale = scale_range[0] + (scale_range[1] - scale_range[0]) * float(draw[0])
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    axes = []
    for occupied, side, share in ((rows, height, draw[2]), (columns, width, draw[1])):
        start, end = int(occupied[0]), int(occupied[-1]) + 1
        offset = float(share) * (side - scale * (end - start)) - scale * start
        centers = torch.arange(side, device=mask.device) + 0.5
        axes.append((centers - offset) / scale)
    inside = (axes[0] >= 0) & (axes[0] < height), (axes[1] >= 0) & (axes[1] < width)
    nearest = [
        axis.floor().long().clamp(0, side - 1) for axis, side in zip(axes, mask.shape, strict=True)
    ]
    moved = mask[nearest[0]][:, nearest[1]] & inside[0][:, None] & inside[1]
    y, x = torch.meshgrid(2 * axes[0] / height - 1, 2 * axes[1] / width - 1, indexing="ij")
    pixels = F.grid_sample(
        image[None].float(), torch.stack([x, y], -1)[None], "bilinear", "border", False
    )
    return pixels[0].round().to(image.dtype), moved


@dataclass(frozen=True)
class StrongDraws:
    """What a strong view does: color changes in order, grayscale, and the blur's sigma or None."""

    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    sigma: float | None


def strong_view(image: Tensor, draws: StrongDraws, reach: float) -> Tensor:
    """The strong view of a (3, H, W) uint8 image on the host, with PIL.

    ``reach``: half width of the blur's kernel, in sigmas.
    """
    picture = TF.to_pil_image(image.cpu())
    for name, amount in draws.jitter:
        picture = getattr(TF, f"adjust_{name}")(picture, amount)
    if draws.grayscale:
        picture = TF.rgb_to_grayscale(picture, 3)
    if draws.sigma is not None:
        kernel = 2 * int(np.ceil(reach * draws.sigma)) + 1
        picture = TF.gaussian_blur(picture, [kernel, kernel], [draws.sigma, draws.sigma])
    return TF.pil_to_tensor(picture).to(image.device)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """One EMA step, tensor by tensor."""
    source = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    for tensors in (teacher.named_parameters(), teacher.named_buffers()):
        for name, tensor in tensors:
            if tensor.is_floating_point():
                tensor.copy_(decay * tensor + (1 - decay) * source[name])
            else:
                tensor.copy_(source[name])
