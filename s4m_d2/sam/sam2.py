"""SAM 2 and 2.1 (Ravi et al., 2024) on single images, by the classes of the sam2 package.

Only the part that images need is built, and built directly: the package's own builder composes its
configs in Hydra's global state. SAM 2 and 2.1 differ in the parts for video alone, so either's
weights fit. The package is optional (``s4m_d2[sam2]``) and is imported where a backend is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from s4m_d2.pretrained import import_optional
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import check_model_type, load_sam
from s4m_d2.sam.point_prompts import Frame, PointPromptBackend

IMAGE_SIDE = 1024
EMBED_DIM = 256
PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
TOP_DOWN_LEVELS = [2, 3]  # of the feature pyramid; the two finest maps are the trunk's alone
DROPPED_LEVELS = 1  # the coarsest map of the pyramid is not an output
# What the published files hold beside the image model, by the start of the parameter's name.
VIDEO_ONLY = ("mask_downsample.", "maskmem_", "memory_", "no_mem_pos_enc", "no_obj_", "obj_ptr_")


@dataclass(frozen=True)
class HieraSize:
    """Arguments of the package's ``Hiera``, the trunk of SAM 2's image encoder."""

    embed_dim: int
    num_heads: int
    stages: tuple[int, ...]  # blocks
    global_att_blocks: tuple[int, ...]
    window_pos_embed_bkg_spatial_size: tuple[int, int] = (7, 7)
    window_spec: tuple[int, ...] = (8, 4, 14, 7)


SIZES = {
    "hiera_t": HieraSize(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "hiera_s": HieraSize(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "hiera_b+": HieraSize(112, 2, (2, 3, 16, 3), (12, 16, 20), (14, 14)),
    "hiera_l": HieraSize(144, 2, (2, 6, 36, 4), (23, 33, 43), window_spec=(8, 4, 16, 8)),
}


class Sam2Backend(PointPromptBackend):
    """A ``SAM2Base`` with the published settings, used as in the package's ``SAM2ImagePredictor``.

    An image's content is stretched to the square, so it covers the whole grid.
    """

    def __init__(self, sam: Any, **options: Any) -> None:
        """Freeze ``sam``; options as those of :class:`PointPromptBackend`."""
        decoder = SimpleNamespace(
            prompt_encoder=sam.sam_prompt_encoder, mask_decoder=sam.sam_mask_decoder
        )
        mean, std = torch.tensor((PIXEL_MEAN, PIXEL_STD), device=sam.device)[..., None, None]
        super().__init__(sam, decoder, Frame(sam.image_size, mean, std, padded=False), **options)

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        *finer_maps, embeddings = self.sam.forward_image(frames)["backbone_fpn"]
        no_memory = self.sam.no_mem_embed.reshape(1, -1, 1, 1)  # an image is a video's first frame
        return embeddings + no_memory, tuple(finer_maps)


def build_sam2_image_model(
    size: HieraSize, *, image_side: int = IMAGE_SIDE, embed_dim: int = EMBED_DIM
) -> nn.Module:
    """Build an untrained ``SAM2Base`` without its memory; of the published sizes by default.

    Args:
        image_side: of the square frame, in pixels; a multiple of 32.
        embed_dim: C, channels of the embeddings; a multiple of 16.
    """
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam2_base import SAM2Base

    trunk = Hiera(**vars(size))
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(embed_dim, warmup_cache=False),
        d_model=embed_dim,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=TOP_DOWN_LEVELS,
        fpn_interp_model="nearest",
    )
    sam = SAM2Base(
        image_encoder=ImageEncoder(trunk, neck, scalp=DROPPED_LEVELS),
        memory_attention=nn.Identity(),
        memory_encoder=nn.Identity(),
        image_size=image_side,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
    )
    del sam.maskmem_tpos_enc, sam.no_mem_pos_enc  # for video
    return sam


@SAM_BACKEND_REGISTRY.register()
def sam2(cfg: Any) -> Sam2Backend:
    """Build the published model of ``cfg.S4M.SAM``, of SAM 2 or 2.1."""
    model_type = cfg.S4M.SAM.MODEL_TYPE
    check_model_type("sam2", model_type)
    hint = " (PyTorch 2.5.1 or newer; --no-build-isolation: pip downloads no other one to build it)"
    import_optional("sam2", "S4M.SAM.BACKEND sam2", needs="hydra", hint=hint)
    sam = load_sam(
        lambda: build_sam2_image_model(SIZES[model_type]),
        cfg.S4M.SAM.CHECKPOINT,
        model_type,
        ignored=VIDEO_ONLY,
    )
    return Sam2Backend.of_config(cfg, sam)
