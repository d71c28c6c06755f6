"""How an image lies in the square frame that a SAM's encoder takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """A square of ``side`` px.

    Attributes:
        mean, std: (3, 1, 1) of RGB in 0..255, on the model's device.
        padded: whether the longer side of a content is resized to ``side`` and the rest is padding
            on the right or at the bottom (SAM); otherwise it is stretched to the square (SAM 2).
    """

    side: int
    mean: Tensor
    std: Tensor
    padded: bool

    def resized(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a content inside the frame, at least 1."""
        if not self.padded:
            return self.side, self.side
        scale = self.side / max(image_size)
        height, width = (max(int(length * scale + 0.5), 1) for length in image_size)
        return height, width

    def scale(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """As :meth:`~s4m_d2.sam.backend.SamBackend.grid_scale`."""
        height, width = self.resized(image_size)
        return width / self.side, height / self.side

    def fill(self, content: Tensor) -> Tensor:
        """(n, 3, H, W) float RGB in 0..255 of equal size as normalized (n, 3, side, side)."""
        height, width = self.resized((content.shape[-2], content.shape[-1]))
        if (height, width) != content.shape[-2:]:
            content = F.interpolate(
                content, (height, width), mode="bilinear", align_corners=False, antialias=True
            )
        normalized = (content - self.mean) / self.std
        return F.pad(normalized, (0, self.side - width, 0, self.side - height))

    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        """As :meth:`~s4m_d2.sam.backend.SamBackend.upscale`."""
        logits = mask_logits[:, None]
        if self.padded:
            square = (self.side, self.side)
            logits = F.interpolate(logits, square, mode="bilinear", align_corners=False)
            height, width = self.resized(image_size)
            logits = logits[..., :height, :width]
        return F.interpolate(logits, image_size, mode="bilinear", align_corners=False)[:, 0]
