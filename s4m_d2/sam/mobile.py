"""MobileSAM (Zhang et al., 2023): SAM with a TinyViT of timm as its image encoder."""

from __future__ import annotations

import re

from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from s4m_d2.pretrained import import_timm

IMAGE_SIDE, GRID_SIDE, CHANNELS = 1024, 64, 256  # as of the published SAM
CLASSIFIER = ("image_encoder.norm_head.", "image_encoder.head.")  # in MobileSAM's file, not used
_NAMES = (  # MobileSAM's, and timm's, where a downsampling belongs to the stage after it
    (re.compile(r"\.patch_embed\.seq\.0\."), ".patch_embed.conv1."),
    (re.compile(r"\.patch_embed\.seq\.2\."), ".patch_embed.conv2."),
    (re.compile(r"\.layers\.(\d)\.downsample\."), lambda m: f".stages.{int(m[1]) + 1}.downsample."),
    (re.compile(r"\.layers\."), ".stages."),
    (re.compile(r"\.c\.weight$"), ".conv.weight"),
)


class TinyViTEncoder(nn.Module):
    """TinyViT-5M, whose last stage keeps the resolution, and SAM's neck.

    Raises:
        ConfigError: timm is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.img_size = IMAGE_SIDE
        timm = import_timm("S4M.SAM.MODEL_TYPE vit_t")
        network = timm.models.tiny_vit.tiny_vit_5m_224(num_classes=0)
        self.patch_embed, self.stages = network.patch_embed, network.stages
        self.stages[-1].downsample.conv2.conv.stride = (1, 1)
        self.neck = nn.Sequential(
            nn.Conv2d(network.num_features, CHANNELS, 1, bias=False),
            LayerNorm2d(CHANNELS),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            LayerNorm2d(CHANNELS),
        )

    def train(self, mode: bool = True) -> TinyViTEncoder:
        """As PyTorch's, but timm's attentions never cache their biases: S4M.SAM.ADAPT trains them
        in eval mode."""
        super().train(mode)
        for module in self.modules():
            if hasattr(module, "attention_bias_cache"):
                module.training = True
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, S, S) -> (B, 256, S / 16, S / 16)."""
        return self.neck(self.stages(self.patch_embed(images)))


def build_mobile_sam() -> Sam:
    """Build the untrained model: side 1024, 64 x 64 x 256 grid."""
    prompt_encoder = PromptEncoder(
        embed_dim=CHANNELS,
        image_embedding_size=(GRID_SIDE, GRID_SIDE),
        input_image_size=(IMAGE_SIDE, IMAGE_SIDE),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=CHANNELS, num_heads=8, mlp_dim=2048)
    decoder = MaskDecoder(transformer_dim=CHANNELS, transformer=transformer)
    return Sam(TinyViTEncoder(), prompt_encoder, decoder)


def timm_name(name: str) -> str:
    """The model's name of a parameter in MobileSAM's file; its own names are unchanged.

    >>> timm_name("image_encoder.layers.1.downsample.conv2.c.weight")
    'image_encoder.stages.2.downsample.conv2.conv.weight'
    """
    for pattern, replacement in _NAMES if name.startswith("image_encoder.") else ():
        name = pattern.sub(replacement, name)
    return name
