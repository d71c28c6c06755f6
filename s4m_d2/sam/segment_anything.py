"""SAM (Kirillov et al., 2023) and MobileSAM (Zhang et al., 2023) by segment-anything's classes.

MobileSAM is SAM with a TinyViT of timm as its image encoder; the packaged SAMs are small.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything import sam_model_registry
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from s4m_d2.pretrained import import_optional
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import check_model_type, load_sam
from s4m_d2.sam.point_prompts import Frame, PointPromptBackend

IMAGE_SIDE, GRID_SIDE, CHANNELS = 1024, 64, 256  # of MobileSAM, as of the published SAM
TINY_SIDE, PATCH_SIZE, PROMPT_DIM = 256, 8, 64  # of the packaged ones
PYRAMID = "tf_efficientnet_lite0"
PYRAMID_SCALE = 0.45  # from SAM's normalization to this network's, (x - 127) / 128
WEIGHTS = Path(__file__).parent / "weights"
TINY_WEIGHTS, TOYSCAPES_WEIGHTS = WEIGHTS / "tiny_sam.pth", WEIGHTS / "tiny_toyscapes.pth"
CLASSIFIER = ("image_encoder.norm_head.", "image_encoder.head.")  # in MobileSAM's file, not used
# From names in MobileSAM's file to timm's, where a downsampling belongs to the stage after it.
MOBILE_SAM_NAMES = {
    r"^(image_encoder\.patch_embed)\.seq\.0\.": r"\1.conv1.",
    r"^(image_encoder\.patch_embed)\.seq\.2\.": r"\1.conv2.",
    **{rf"^(image_encoder)\.layers\.{i}(\.downsample)": rf"\1.stages.{i + 1}\2" for i in range(3)},
    r"^(image_encoder)\.layers\.": r"\1.stages.",
    r"^(image_encoder\..*)\.c\.weight$": r"\1.conv.weight",
}


class SegmentAnythingBackend(PointPromptBackend):
    """Any model of segment-anything's classes."""

    def __init__(self, sam: Sam, **options: Any) -> None:
        """Freeze ``sam``; options as those of :class:`PointPromptBackend`."""
        frame = Frame(sam.image_encoder.img_size, sam.pixel_mean, sam.pixel_std, padded=True)
        super().__init__(sam, sam, frame, **options)

    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.sam.image_encoder(frames), ()


class TinyViTEncoder(nn.Module):
    """TinyViT-5M, whose last stage keeps the resolution, and SAM's neck."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = IMAGE_SIDE
        timm = import_optional("timm", "S4M.SAM.MODEL_TYPE vit_t")
        network = timm.create_model("tiny_vit_5m_224", num_classes=0)
        self.patch_embed, self.stages = network.patch_embed, network.stages
        self.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(network.num_features, CHANNELS, 1, bias=False),
            LayerNorm2d(CHANNELS),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(CHANNELS),
        )

    def train(self, mode: bool = True) -> TinyViTEncoder:
        """As PyTorch's, but timm's attentions never cache biases: S4M.SAM.ADAPT trains in eval."""
        super().train(mode)
        for module in self.modules():
            if hasattr(module, "attention_bias_cache"):
                module.training = True
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        return self.neck(self.stages(self.patch_embed(images)))


def assemble_sam(encoder: Any, grid_side: int, channels: int, **transformer_options: int) -> Sam:
    """Build an untrained SAM around an image encoder, from (B, 3, S, S) with S its ``img_size`` to
    (B, channels, grid_side, grid_side)."""
    prompt_encoder = PromptEncoder(
        embed_dim=channels,
        image_embedding_size=(grid_side, grid_side),
        input_image_size=(encoder.img_size, encoder.img_size),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=channels, **transformer_options)
    decoder = MaskDecoder(
        transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels
    )
    return Sam(encoder, prompt_encoder, decoder)


def build_mobile_sam() -> Sam:
    """Build the untrained model: side 1024, 64 x 64 x 256 grid."""
    return assemble_sam(TinyViTEncoder(), GRID_SIDE, CHANNELS, num_heads=8, mlp_dim=2048)


class PhotographEncoder(nn.Module):
    """A vision transformer plus a pyramid of ImageNet features at strides 8, 16 and 32.

    The pyramid's output is initialized to 0, so that training starts from the transformer alone.
    """

    def __init__(self, transformer: ImageEncoderViT) -> None:
        super().__init__()
        self.img_size = transformer.img_size
        self.transformer = transformer
        timm = import_optional("timm", "S4M.SAM.BACKEND tiny")
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
        img_size=TINY_SIDE,
        patch_size=PATCH_SIZE,
        embed_dim=96,
        depth=6,
        num_heads=4,
        mlp_ratio=4,
        out_chans=PROMPT_DIM,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=8,
        global_attn_indexes=(2, 5),
    )
    grid_side = TINY_SIDE // PATCH_SIZE
    attention = {"num_heads": 2, "mlp_dim": 256, "attention_downsample_rate": 1}
    return assemble_sam(encoder, grid_side, PROMPT_DIM, **attention)


def build_tiny_sam() -> Sam:
    """Build the untrained SAM with the encoder for photographs."""
    sam = build_tiny_toyscapes()
    sam.image_encoder = PhotographEncoder(sam.image_encoder)
    return sam


def _backend(cfg: Any, *source: Any, **options: Any) -> SegmentAnythingBackend:
    """Of what :func:`load_sam` loads."""
    return SegmentAnythingBackend.build_from_config(cfg, load_sam(*source, **options))


@SAM_BACKEND_REGISTRY.register()
def segment_anything(cfg: Any) -> SegmentAnythingBackend:
    """Build the published model of ``cfg.S4M.SAM``."""
    model_type = cfg.S4M.SAM.MODEL_TYPE
    check_model_type("segment_anything", model_type)
    path = cfg.S4M.SAM.CHECKPOINT
    if model_type == "vit_t":
        changes = {"ignored": CLASSIFIER, "names": MOBILE_SAM_NAMES}
        return _backend(cfg, build_mobile_sam, path, model_type, **changes)
    return _backend(cfg, sam_model_registry[model_type], path, model_type)


@SAM_BACKEND_REGISTRY.register()
def tiny(cfg: Any) -> SegmentAnythingBackend:
    """The packaged SAM for photographs, or its model with the weights of S4M.SAM.CHECKPOINT."""
    return _backend(cfg, build_tiny_sam, cfg.S4M.SAM.CHECKPOINT or TINY_WEIGHTS, "tiny")


@SAM_BACKEND_REGISTRY.register()
def tiny_toyscapes(cfg: Any) -> SegmentAnythingBackend:
    """The packaged SAM for toyscapes, or its model with the weights of S4M.SAM.CHECKPOINT."""
    path = cfg.S4M.SAM.CHECKPOINT or TOYSCAPES_WEIGHTS
    return _backend(cfg, build_tiny_toyscapes, path, "tiny_toyscapes")
