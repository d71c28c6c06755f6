"""Pixel decoder: multi-scale features and per-pixel mask features from the backbone's maps."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from s4m_d2.errors import require
from s4m_d2.layers import MSDeformAttn, cell_centers, sine_position_encoding

NUM_FEATURE_LEVELS = 3  # feature maps that the transformer decoder attends to in turn
NUM_GROUPS = 32  # of the group normalization after each input projection
ENCODER_FEEDFORWARD = 1024  # Mask2Former fixes it for the deformable encoder


def register_if_free(head: type) -> type:
    """Register a head under its name unless Mask2Former's package, imported first, has taken it.

    ``meta_arch.build_head`` finds our classes without the registry.
    """
    if head.__name__ not in SEM_SEG_HEADS_REGISTRY:
        SEM_SEG_HEADS_REGISTRY.register(head)
    return head


def xavier_fill(conv: Conv2d) -> Conv2d:
    """Draw uniform weights with variance 1 / fan-in, zero bias ("XavierFill" in Mask2Former)."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear; the maps themselves if they have the size."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels and a feed-forward network, post-norm."""

    def __init__(
        self, *, embed_dim: int, feedforward_dim: int, dropout: float, **attention: int
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(embed_dim=embed_dim, **attention)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, reference_points: Tensor, level_sizes: list
    ) -> Tensor:
        """tokens (B, S, C), positions (1, S, C), reference_points (1, S, 2) -> (B, S, C)."""
        attended = self.self_attn(tokens + positions, reference_points, tokens, level_sizes)
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.linear2(self.dropout(F.relu(self.linear1(tokens))))
        return self.norm2(tokens + self.dropout(hidden))


class MultiScaleEncoder(nn.Module):
    """Encodes the cells of several maps together; each level has an embedding."""

    def __init__(
        self, *, embed_dim: int, num_levels: int, num_layers: int, **layer_args: Any
    ) -> None:
        super().__init__()
        layers = [
            DeformableEncoderLayer(embed_dim=embed_dim, num_levels=num_levels, **layer_args)
            for _ in range(num_layers)
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim))
        nn.init.normal_(self.level_embed)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[(B, C, H_l, W_l)] -> the same shapes."""
        sizes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        tokens = torch.cat([feature.flatten(2) for feature in features], dim=2).transpose(1, 2)
        codes = [
            sine_position_encoding(size, len(embed), device=tokens.device) + embed[:, None, None]
            for size, embed in zip(sizes, self.level_embed, strict=True)
        ]
        positions = torch.cat([code.flatten(1) for code in codes], dim=1).T[None]
        centers = torch.cat([cell_centers(size, tokens.device) for size in sizes])[None]
        for layer in self.encoder["layers"].children():
            tokens = layer(tokens, positions, centers, sizes)
        levels = tokens.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
        return [x.reshape(*x.shape[:2], *size) for x, size in zip(levels, sizes, strict=True)]


@register_if_free
class MSDeformAttnPixelDecoder(nn.Module):
    """Deformable encoder on the coarse maps, then feature-pyramid levels down to the mask features.

    Always float32: autocast is switched off inside.

    Args:
        input_shape: channels and stride of each backbone map.
        encoded: names of the maps that go through the encoder.
        conv_dim: channels inside, a multiple of 32 and of ``num_heads``.
        mask_dim: channels of the mask features.
        norm: normalization of the pyramid's convolutions, as in ``detectron2.layers.get_norm``.
        common_stride: stride of the mask features.
        encoder: its ``dropout``, ``num_heads``, ``num_layers``, ``num_points`` per head and level.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        encoded: list[str],
        conv_dim: int,
        mask_dim: int,
        norm: str,
        common_stride: int,
        **encoder: Any,
    ) -> None:
        super().__init__()
        key, groups = "MODEL.SEM_SEG_HEAD", f"a multiple of {NUM_GROUPS}"
        require(f"{key}.CONVS_DIM", conv_dim, conv_dim % NUM_GROUPS == 0, groups)
        strides = {name: shape.stride for name, shape in input_shape.items()}
        names = sorted(strides, key=strides.__getitem__)
        self.coarse_to_fine = [name for name in names[::-1] if name in encoded]
        are_known = 0 < len({*encoded}) == len(self.coarse_to_fine)
        key += ".DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
        require(key, encoded, are_known, f"some of IN_FEATURES {sorted(names)}")
        finest = strides[self.coarse_to_fine[-1]]
        fine = [name for name in names if common_stride <= strides[name] < finest]
        self.pyramid_levels = [*enumerate(fine, start=1)][::-1]
        self.input_proj = nn.ModuleList(
            _input_projection(input_shape[name].channels, conv_dim) for name in self.coarse_to_fine
        )
        self.transformer = MultiScaleEncoder(
            embed_dim=conv_dim,
            num_levels=len(self.coarse_to_fine),
            feedforward_dim=ENCODER_FEEDFORWARD,
            **encoder,
        )
        for number, name in enumerate(fine, start=1):
            lateral = _pyramid_conv(input_shape[name].channels, conv_dim, 1, norm)
            output = _pyramid_conv(conv_dim, conv_dim, 3, norm, activation=F.relu)
            self.add_module(f"adapter_{number}", xavier_fill(lateral))
            self.add_module(f"layer_{number}", xavier_fill(output))
        self.mask_features = xavier_fill(Conv2d(conv_dim, mask_dim, kernel_size=1))

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "encoded": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "num_heads": head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS,
            "num_layers": head.TRANSFORMER_ENC_LAYERS,
            "num_points": head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS,
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "common_stride": head.COMMON_STRIDE,
        }

    def forward(self, features: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode.

        Args:
            features: backbone maps (B, C_i, H_i, W_i) by name.

        Returns:
            mask features (B, mask_dim, H/4, W/4) float32, and the three coarsest maps
            (B, conv_dim, H_l, W_l) float32, from coarse to fine.
        """
        device_type = next(iter(features.values())).device.type
        with torch.autocast(device_type=device_type, enabled=False):
            pairs = zip(self.input_proj, self.coarse_to_fine, strict=True)
            maps = self.transformer([project(features[name].float()) for project, name in pairs])
            for number, name in self.pyramid_levels:
                lateral = getattr(self, f"adapter_{number}")(features[name].float())
                coarse = resize(maps[-1], lateral.shape[-2:])
                maps.append(getattr(self, f"layer_{number}")(lateral + coarse))
            return self.mask_features(maps[-1]), maps[:NUM_FEATURE_LEVELS]


def _input_projection(in_channels: int, conv_dim: int) -> nn.Sequential:
    conv: Any = nn.Conv2d(in_channels, conv_dim, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(NUM_GROUPS, conv_dim))


def _pyramid_conv(in_channels: int, channels: int, size: int, norm: str, **options: Any) -> Conv2d:
    options |= {"bias": norm == "", "norm": get_norm(norm, channels)}
    return Conv2d(in_channels, channels, size, padding=size // 2, **options)
