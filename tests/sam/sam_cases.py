"""Small SAMs with random weights for both backends, and images for them."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn

from s4m_d2.sam.sam2 import HieraSize, Sam2Backend, build_sam2_image_model
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.sam.tiny import build_tiny_toyscapes

needs_sam2 = pytest.mark.skipif(
    importlib.util.find_spec("sam2") is None,
    reason='the optional package sam2 is not installed: pip install "s4m_d2[sam2]"',
)
SMALL_HIERA = HieraSize(8, 1, (1, 1, 2, 1), (3,))
SAM2_SIDE = 128
LOGITS = {"atol": 2e-5, "rtol": 1e-4}


def with_random_weights(sam: nn.Module) -> nn.Module:
    """Every parameter random, also those that a library starts at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in sam.state_dict().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return sam


def small_sam2() -> nn.Module:
    sam = build_sam2_image_model(SMALL_HIERA, image_side=SAM2_SIDE, embed_dim=32)
    return with_random_weights(sam)


def build_small(name: str, **options) -> SegmentAnythingBackend | Sam2Backend:
    """The backend of that name around a small model."""
    if name == "sam2":
        return Sam2Backend(small_sam2(), **options)
    return SegmentAnythingBackend(with_random_weights(build_tiny_toyscapes()), **options)


def build_smallest(name: str, **options) -> SegmentAnythingBackend | Sam2Backend:
    """The same, where many images have to be encoded: frames of 64 (SAM) and 128 px (SAM 2)."""
    if name == "sam2":
        return build_small(name, **options)
    encoder = ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=16, depth=2, num_heads=2, out_chans=32,
        use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    prompts = PromptEncoder(32, (8, 8), (64, 64), mask_in_chans=4)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=2, mlp_dim=32)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer)
    return SegmentAnythingBackend(with_random_weights(Sam(encoder, prompts, decoder)), **options)


def image_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def batch_of(*images: torch.Tensor, fill: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Images at the top left of one (B, 3, H, W) batch, and their sizes."""
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    batch = torch.full((len(images), 3, height, width), fill, dtype=torch.uint8)
    for i, (h, w) in enumerate(sizes):
        batch[i, :, :h, :w] = images[i]
    return batch, sizes
