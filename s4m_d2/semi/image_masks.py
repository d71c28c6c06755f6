"""Masks at image size from logits of any size, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from s4m_d2.semi.pseudo_labels import Selection

MASKS_AT_ONCE = 16  # masks resized to image size together; bounds the memory


def teacher_masks(
    selection: Selection, image_size: tuple[int, int], logit_thresh: float = 0.0
) -> Tensor:
    """The selection's masks at ``image_size`` (H, W): logits read bilinearly, then thresholded.

    Both frames show the same content, also where it ends inside a pixel of the prediction.
    """
    logits = selection.mask_logits
    resize = teacher_resize(logits, selection.content_size, image_size)
    return threshold_in_chunks(logits, image_size, resize, logit_thresh)


def teacher_resize(
    logits: Tensor, content_size: tuple[float, float], image_size: tuple[int, int]
) -> Callable[[Tensor], Tensor]:
    """What resizes (n, h', w') ``logits``, of which ``content_size`` is content, to the image."""
    axes = [
        (torch.arange(side, device=logits.device) + 0.5) * (2 * extent / (side * pixels)) - 1
        for side, extent, pixels in zip(image_size, content_size, logits.shape[1:], strict=True)
    ]
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None]

    def resize(chunk: Tensor) -> Tensor:
        resized = F.grid_sample(
            chunk[None], grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return resized[0]

    return resize


def threshold_in_chunks(
    logits: Tensor, image_size: tuple[int, int], resize: Callable[[Tensor], Tensor], thresh: float
) -> Tensor:
    """(N, H, W) bool: where the resized logits exceed the threshold."""
    masks = torch.empty((len(logits), *image_size), dtype=torch.uint8, device=logits.device)
    for start in range(0, len(logits), MASKS_AT_ONCE):
        chunk = slice(start, start + MASKS_AT_ONCE)
        torch.gt(resize(logits[chunk]), thresh, out=masks[chunk])  # to bytes, which is vectorized
    return masks.view(torch.bool)
