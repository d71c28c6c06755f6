"""The packaged SAMs: segment-anything's classes at a small size."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from s4m_d2.pretrained import import_timm
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.point_prompts import build_compute_options
from s4m_d2.sam.segment_anything import SegmentAnythingBackend, assemble_sam

IMAGE_SIDE, PATCH_SIZE, PROMPT_DIM = 256, 8, 64
PYRAMID = "tf_efficientnet_lite0"
PYRAMID_SCALE = 0.45  # from SAM's normalization to this network's, (x - 127) / 128
WEIGHTS = Path(__file__).parent / "weights"
TINY_WEIGHTS, TOYSCAPES_WEIGHTS = WEIGHTS / "tiny_sam.pth", WEIGHTS / "tiny_toyscapes.pth"


class PhotographEncoder(nn.Module):
    """A vision transformer plus a pyramid of ImageNet features at strides 8, 16 and 32.

    The pyramid's output is initialized to 0, so that training starts from the transformer alone.
    """

    def __init__(self, transformer: ImageEncoderViT) -> None:
        super().__init__()
        self.img_size = transformer.img_size
        self.transformer = transformer
        timm = import_timm("S4M.SAM.BACKEND tiny")
        pyramid = timm.create_model(PYRAMID, features_only=True, out_indices=(2, 3, 4))
        self.pyramid = pyramid.to(memory_format=torch.channels_last)  # depthwise convolutions gain
        widths = pyramid.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(width, PROMPT_DIM, 1) for width in widths)
        first, last = (nn.Conv2d(PROMPT_DIM, PROMPT_DIM, 3, padding=1) for _ in range(2))
        self.output = nn.Sequential(first, nn.GroupNorm(8, PROMPT_DIM), nn.ReLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) -> (B, 64, S / 8, S / 8)."""
        scaled = (PYRAMID_SCALE * images).contiguous(memory_format=torch.channels_last)
        maps = [conv(level) for conv, level in zip(self.lateral, self.pyramid(scaled), strict=True)]
        size = maps[0].shape[-2:]
        coarse = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps[1:]]
        return self.transformer(images) + self.output(sum(coarse, maps[0]))


def build_tiny_toyscapes() -> Sam:
    """Build the untrained SAM for toyscapes: side 256, 32 x 32 x 64 grid, 128 x 128 masks."""
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
    grid_side = IMAGE_SIDE // PATCH_SIZE
    attention = {"num_heads": 2, "mlp_dim": 256, "attention_downsample_rate": 1}
    return assemble_sam(encoder, grid_side, PROMPT_DIM, **attention)


def build_tiny_sam() -> Sam:
    """Build the untrained SAM with the encoder for photographs."""
    sam = build_tiny_toyscapes()
    sam.image_encoder = PhotographEncoder(sam.image_encoder)
    return sam


@SAM_BACKEND_REGISTRY.register()
def tiny(cfg: Any) -> SegmentAnythingBackend:
    """The packaged SAM for photographs, or its model with the weights of S4M.SAM.CHECKPOINT."""
    sam = load_sam(build_tiny_sam, cfg.S4M.SAM.CHECKPOINT or TINY_WEIGHTS, "tiny")
    return SegmentAnythingBackend(sam.to(cfg.MODEL.DEVICE), **build_compute_options(cfg))


@SAM_BACKEND_REGISTRY.register()
def tiny_toyscapes(cfg: Any) -> SegmentAnythingBackend:
    """The packaged SAM for toyscapes, or its model with the weights of S4M.SAM.CHECKPOINT."""
    path = cfg.S4M.SAM.CHECKPOINT or TOYSCAPES_WEIGHTS
    sam = load_sam(build_tiny_toyscapes, path, "tiny_toyscapes")
    return SegmentAnythingBackend(sam.to(cfg.MODEL.DEVICE), **build_compute_options(cfg))
