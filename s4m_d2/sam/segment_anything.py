"""SAM (Kirillov et al., 2023) through the segment-anything package: vit_b, vit_l, vit_h."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor

from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import check_model_type, load_sam
from s4m_d2.sam.point_prompts import PointPromptBackend, build_compute_options


class SegmentAnythingBackend(PointPromptBackend):
    """Any model of segment-anything's classes.

    The longer side of an image's content is resized to ``image_side``, and the square is padded on
    the right or at the bottom, as in the library.
    """

    def __init__(self, sam: Sam, **options: Any) -> None:
        """Freeze ``sam``; options as those of :class:`PointPromptBackend`."""
        super().__init__(sam, sam, sam.image_encoder.img_size, **options)

    def grid_scale(self, image_size: tuple[int, int]) -> tuple[float, float]:
        height, width = self._resized(image_size)
        return width / self.image_side, height / self.image_side

    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        height, width = self._resized(image_size)
        side = (self.image_side, self.image_side)
        square = F.interpolate(mask_logits[:, None], side, mode="bilinear", align_corners=False)
        content = square[..., :height, :width]
        return F.interpolate(content, image_size, mode="bilinear", align_corners=False)[:, 0]

    def _to_frames(self, content: Tensor) -> Tensor:
        height, width = content.shape[-2:]
        target = self._resized((height, width))
        if target != (height, width):
            content = F.interpolate(
                content, target, mode="bilinear", align_corners=False, antialias=True
            )
        return self.sam.preprocess(content)

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.sam.image_encoder(frames), ()

    def _resized(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a content inside the square frame, at least 1."""
        height, width = ResizeLongestSide.get_preprocess_shape(*image_size, self.image_side)
        return max(height, 1), max(width, 1)


@SAM_BACKEND_REGISTRY.register()
def segment_anything(cfg: Any) -> SegmentAnythingBackend:
    """Build the published model of ``cfg.S4M.SAM``."""
    model_type = cfg.S4M.SAM.MODEL_TYPE
    check_model_type("segment_anything", model_type)
    sam = load_sam(sam_model_registry[model_type], cfg.S4M.SAM.CHECKPOINT, model_type)
    return SegmentAnythingBackend(sam.to(cfg.MODEL.DEVICE), **build_compute_options(cfg))
