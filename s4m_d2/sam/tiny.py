"""The tiny SAM: segment-anything's classes at a small size, with weights in the package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.point_prompts import build_compute_options
from s4m_d2.sam.segment_anything import SegmentAnythingBackend

IMAGE_SIDE = 256
PATCH_SIZE = 8
GRID_SIDE = IMAGE_SIDE // PATCH_SIZE
PROMPT_DIM = 64
PIXEL_MEAN = (123.675, 116.28, 103.53)  # those of the published SAM, RGB, 0..255
PIXEL_STD = (58.395, 57.12, 57.375)
PACKAGED_WEIGHTS = Path(__file__).parent / "weights" / "tiny_sam.pth"


def build_tiny_sam() -> Sam:
    """The untrained tiny SAM: side 256, a 32 x 32 grid of 64 channels, 128 x 128 masks."""
    encoder = ImageEncoderViT(
        img_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        embed_dim=96,
        depth=6,
        num_heads=4,
        mlp_ratio=4,
        out_chans=PROMPT_DIM,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(2, 5),
    )
    prompt_encoder = PromptEncoder(
        embed_dim=PROMPT_DIM,
        image_embedding_size=(GRID_SIDE, GRID_SIDE),
        input_image_size=(IMAGE_SIDE, IMAGE_SIDE),
        mask_in_chans=16,
    )
    decoder = MaskDecoder(
        transformer_dim=PROMPT_DIM,
        transformer=TwoWayTransformer(
            depth=2,
            embedding_dim=PROMPT_DIM,
            num_heads=2,
            mlp_dim=256,
            attention_downsample_rate=1,
        ),
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=PROMPT_DIM,
    )
    return Sam(encoder, prompt_encoder, decoder, list(PIXEL_MEAN), list(PIXEL_STD))


@SAM_BACKEND_REGISTRY.register()
def tiny(cfg: Any) -> SegmentAnythingBackend:
    """The packaged tiny SAM where ``cfg.S4M.SAM.CHECKPOINT`` is "", else that file's weights."""
    sam = load_sam(build_tiny_sam, cfg.S4M.SAM.CHECKPOINT or PACKAGED_WEIGHTS, "tiny")
    return SegmentAnythingBackend(sam.to(cfg.MODEL.DEVICE), **build_compute_options(cfg))
