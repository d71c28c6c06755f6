"""SAM (Kirillov et al., 2023) and MobileSAM (vit_t) by the classes of segment-anything."""

from __future__ import annotations

from typing import Any

from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import Tensor

from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import check_model_type, load_sam
from s4m_d2.sam.frames import Frame
from s4m_d2.sam.mobile import CLASSIFIER, build_mobile_sam, timm_name
from s4m_d2.sam.point_prompts import PointPromptBackend, build_compute_options


class SegmentAnythingBackend(PointPromptBackend):
    """Any model of segment-anything's classes.

    The longer side of an image's content is resized to ``image_side``, and the square is padded on
    the right or at the bottom, as in the library.
    """

    def __init__(self, sam: Sam, **options: Any) -> None:
        """Freeze ``sam``; options as those of :class:`PointPromptBackend`."""
        frame = Frame(sam.image_encoder.img_size, sam.pixel_mean, sam.pixel_std, padded=True)
        super().__init__(sam, sam, frame, **options)

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.sam.image_encoder(frames), ()


@SAM_BACKEND_REGISTRY.register()
def segment_anything(cfg: Any) -> SegmentAnythingBackend:
    """Build the published model of ``cfg.S4M.SAM``."""
    model_type = cfg.S4M.SAM.MODEL_TYPE
    check_model_type("segment_anything", model_type)
    path = cfg.S4M.SAM.CHECKPOINT
    if model_type == "vit_t":
        sam = load_sam(build_mobile_sam, path, model_type, CLASSIFIER, timm_name)
    else:
        sam = load_sam(sam_model_registry[model_type], path, model_type)
    return SegmentAnythingBackend(sam.to(cfg.MODEL.DEVICE), **build_compute_options(cfg))
