"""Any timm model as a Detectron2 backbone with the maps res2 to res5; names of its weights.

Models with several strides (ResNet, ConvNeXt, Swin) return the maps themselves. A plain ViT returns
one map, from which a simple feature pyramid makes four. Strides are exact: if the side of a ViT's
patch is not a power of two, the images are resized so that one patch covers as many pixels as the
nearest power of two. With DINOv2's patches of 14 px an image of 512 x 1024 becomes 448 x 896, a
grid of 32 x 64 patches, each of 16 x 16 px of the image.

Weights of timm, of the models' authors and of Mask2Former are renamed to ours. timm is imported
only where a model is built.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from s4m_d2.errors import ConfigError, InputError, WeightsError, require
from s4m_d2.pretrained import import_optional, renamed

OUT_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_COARSEST = max(OUT_STRIDES.values())
VIT_EPS = 1e-6  # of ViTDet's layer norms
_PIXEL_TOLERANCE = 0.5  # of a normalization, in 0..255 units
# Options of some models that allow images of any size. With them Swin's windows always have their
# full size, shifted in every second block.
_ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False, "always_partition": True}

BACKBONE = "backbone."
NET = f"{BACKBONE}net."
#: Layers of our backbones that no pre-trained model has: they keep their initial weights.
ADDED_LAYERS = (f"{BACKBONE}norms.", f"{BACKBONE}pyramid.")

_ORIGINAL_SWIN = "layers.0.downsample.reduction.weight"
_COMPUTED = ("relative_position_index", "attn_mask")  # not in timm's files
_TIMM_SWIN = f"{NET}layers.0.blocks.0.attn.relative_position_bias_table"
# Patterns and replacements. The original Swin merges patches at the end of a stage, timm at the
# start of the next; Mask2Former has a norm per stage, and stage 0 gives res2.
_FROM_ORIGINAL_SWIN = {
    **{rf"^(backbone\.)?norm{i}\.": rf"\1norms.res{i + 2}." for i in range(4)},
    **{rf"(layers\.){i}(\.downsample\.)": rf"\g<1>{i + 1}\2" for i in (2, 1, 0)},
}
_TO_MASK2FORMER = {
    **{rf"^backbone\.norms\.res{i + 2}\.": f"backbone.norm{i}." for i in range(4)},
    **{rf"(layers\.){i + 1}(\.downsample\.)": rf"\g<1>{i}\2" for i in range(3)},
    r"^backbone\.net\.": "backbone.",
}

logger = logging.getLogger(__name__)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W) maps, at each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class SimpleFeaturePyramid(nn.Module):
    """Computes maps of all OUT_STRIDES from a map of one stride (ViTDet, Li et al., ECCV 2022).

    Finer maps come from 2 x 2 transposed convolutions, each of which halves the channels, with a
    layer norm and a GELU between two of them; coarser ones from 2 x 2 max-pooling. A 1 x 1 and a
    3 x 3 convolution, each followed by a layer norm, then give every map the same channels.

    Args:
        in_channels: channels of the map; a multiple of 2 for each halving.
        stride: of the map, in pixels of the image; a power of two.
        out_channels: channels of the returned maps.
    """

    def __init__(self, *, in_channels: int, stride: int, out_channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            _pyramid_level(in_channels, stride, out_stride, out_channels)
            for out_stride in OUT_STRIDES.values()
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> (B, out_channels, H · stride / s, W · stride / s) of each s."""
        return [level(x) for level in self.levels]


def _pyramid_level(channels: int, stride: int, out_stride: int, out_channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    while stride < out_stride:
        layers.append(nn.MaxPool2d(2))
        stride *= 2
    while stride > out_stride:
        if layers:
            layers += [ChannelNorm(channels, eps=VIT_EPS), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels, stride = channels // 2, stride // 2
    for kernel_size in (1, 3):
        conv = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        layers += [conv, ChannelNorm(out_channels, eps=VIT_EPS)]
        channels = out_channels
    return nn.Sequential(*layers)


def resize_to_grid(images: Tensor, *, patch: int, stride: int) -> Tensor:
    """Resize images so that one patch of a ViT covers ``stride`` x ``stride`` pixels of them.

    (B, C, H, W), H and W multiples of ``stride`` -> (B, C, H · patch / stride, W · patch / stride),
    bilinear with antialiasing.
    """
    if patch == stride:
        return images
    size = [side // stride * patch for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


class TimmBackbone(Backbone):
    """A timm model with maps at strides 4, 8, 16 and 32.

    Args:
        net: a timm model; layers that no map needs are removed.
        out_indices: indices of the model's feature maps to use: four, of strides 4, 8, 16 and 32,
            or one of a plain ViT. Empty: the last of each stride, or the ViT's last, after the
            model's final norm.
        out_norm: add a layer norm over the channels of every map, as in Mask2Former's Swin; not
            for a plain ViT, whose pyramid has its own norms.
        pyramid_channels: channels of the four maps of a plain ViT.
        frozen: do not change the model's weights and statistics.
        grad_checkpoint: recompute activations in the backward pass.
    """

    @configurable
    def __init__(
        self,
        *,
        net: Any,
        out_indices: Sequence[int] = (),
        out_norm: bool = False,
        pyramid_channels: int = 256,
        frozen: bool = False,
        grad_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        strides, channels = _feature_info(net)
        self.is_plain = len(set(strides)) == 1
        indices = _choose(strides, out_indices)
        self.out_indices = net.prune_intermediate_layers(indices, prune_norm=not self.is_plain)
        self.net = net
        if grad_checkpoint:
            net.set_grad_checkpointing(True)
        self.frozen = frozen
        if frozen:
            net.requires_grad_(False)
        # Faster for depthwise convolutions on a CPU (docs/performance.md), not for others.
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in net.modules())
        self.memory_format = torch.channels_last if depthwise else torch.contiguous_format
        self.patch = strides[-1]
        self.grid_stride = 2 ** round(math.log2(self.patch))
        widths = [channels[index] for index in indices]
        self.pyramid = self.norms = None
        if self.is_plain:
            expected = "False: the pyramid of a plain ViT has norms of its own"
            require("MODEL.TIMM.OUT_NORM", out_norm, not out_norm, expected)
            self.pyramid = SimpleFeaturePyramid(
                in_channels=widths[0], stride=self.grid_stride, out_channels=pyramid_channels
            )
            widths = [pyramid_channels] * len(OUT_STRIDES)
        self._out_features, self._out_feature_strides = list(OUT_STRIDES), OUT_STRIDES
        self._out_feature_channels = dict(zip(OUT_STRIDES, widths, strict=True))
        if out_norm:
            norms = {name: ChannelNorm(size) for name, size in self._out_feature_channels.items()}
            self.norms = nn.ModuleDict(norms)

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec) -> dict:
        options = cfg.MODEL.TIMM
        is_loaded = options.PRETRAINED and not cfg.MODEL.WEIGHTS
        net = _create_net(options, pretrained=is_loaded, in_channels=input_shape.channels)
        if options.PRETRAINED:
            if cfg.MODEL.WEIGHTS:
                logger.info("MODEL.WEIGHTS is set: timm's weights are not loaded.")
            _warn_of_normalization(cfg, net)
        keys = ("OUT_INDICES", "OUT_NORM", "PYRAMID_CHANNELS", "FROZEN", "GRAD_CHECKPOINT")
        return {"net": net, **{key.lower(): options[key] for key in keys}}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps.

        Args:
            images: (B, C, H, W), normalized; for a plain ViT H and W are multiples of 32.

        Returns:
            "res2" to "res5": (B, C_i, H / s, W / s) for s = 4, 8, 16, 32.

        Raises:
            InputError: the sides are not multiples of 32.
        """
        if self.is_plain:
            if any(side % _COARSEST for side in images.shape[-2:]):
                raise InputError(
                    f"expected images whose sides are multiples of {_COARSEST}, got "
                    f"{tuple(images.shape[-2:])}; pad them (MODEL.MASK_FORMER.SIZE_DIVISIBILITY)"
                )
            images = resize_to_grid(images, patch=self.patch, stride=self.grid_stride)
        maps = self.net.forward_intermediates(
            images.contiguous(memory_format=self.memory_format),
            indices=self.out_indices,
            norm=self.is_plain,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        maps = self.pyramid(maps[0]) if self.pyramid is not None else maps
        if self.norms is not None:
            maps = [self.norms[name](value) for name, value in zip(OUT_STRIDES, maps, strict=True)]
        return dict(zip(OUT_STRIDES, maps, strict=True))

    def train(self, mode: bool = True) -> TimmBackbone:
        """Keep a frozen model in evaluation mode: no stochastic depth, no new statistics."""
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    @property
    def size_divisibility(self) -> int:
        """Divisor of the images' sides, px."""
        return _COARSEST


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the backbone of ``MODEL.TIMM``."""
    return TimmBackbone(cfg, input_shape)


def _feature_info(net: nn.Module) -> tuple[list[int], list[int]]:
    """Stride and channels of each of the model's feature maps."""
    info = getattr(net, "feature_info", None)
    if not info or not hasattr(net, "forward_intermediates"):
        raise ConfigError(
            f"MODEL.TIMM.NAME: a {type(net).__name__} of timm returns no feature maps; choose "
            "another model."
        )
    entries = getattr(info, "info", info)
    return [entry["reduction"] for entry in entries], [entry["num_chs"] for entry in entries]


def _choose(strides: Sequence[int], out_indices: Sequence[int]) -> list[int]:
    """The indices of the maps to take, checked."""
    plain = len(set(strides)) == 1
    wanted = [strides[0]] if plain else list(OUT_STRIDES.values())
    by_index = dict(enumerate(strides))
    last = {stride: index for index, stride in by_index.items()}
    chosen = list(out_indices) or [last.get(stride, -1) for stride in wanted]
    if [by_index.get(index) for index in chosen] == wanted:
        return chosen
    raise ConfigError(
        f"MODEL.TIMM.OUT_INDICES is {list(out_indices)}; expected the "
        f"{'index of one map' if plain else f'indices of maps of strides {wanted}'}. The maps of "
        f"this model have strides {list(strides)}."
    )


def _warn_of_normalization(cfg, net: Any) -> None:
    """Warn if PIXEL_MEAN and PIXEL_STD differ from those of the pre-training."""
    flip = slice(None, None, 1 if cfg.INPUT.FORMAT == "RGB" else -1)
    for key, name in (("PIXEL_MEAN", "mean"), ("PIXEL_STD", "std")):
        known = [round(255 * value, 3) for value in net.pretrained_cfg[name]]
        given = cfg.MODEL[key][flip]
        pairs = zip(known, given, strict=False)
        if len(given) == len(known) and any(abs(a - b) > _PIXEL_TOLERANCE for a, b in pairs):
            message = "MODEL.%s is %s, but %s was trained with %s (RGB)."
            logger.warning(message, key, list(cfg.MODEL[key]), cfg.MODEL.TIMM.NAME, known)


def _create_net(options: Any, *, pretrained: bool, in_channels: int) -> nn.Module:
    """Create a timm model without its classifier, from ``MODEL.TIMM``."""
    timm = import_optional("timm", 'MODEL.BACKBONE.NAME "build_timm_backbone"')
    name, norm = options.NAME, options.NORM
    accepted = _accepted_options(timm, name, options.DROP_PATH)
    if pretrained and not timm.is_model_pretrained(name):
        raise ConfigError(
            f"MODEL.TIMM.PRETRAINED: timm {timm.__version__} has no weights of {name!r}. Choose "
            "another MODEL.TIMM.NAME, or set MODEL.TIMM.PRETRAINED False."
        )
    try:
        fixed = {"num_classes": 0, "in_chans": in_channels}
        net = timm.create_model(name, pretrained=pretrained, **fixed, **accepted)
    except OSError as error:
        raise WeightsError(
            f"MODEL.TIMM.PRETRAINED: the weights of {name!r} cannot be fetched "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}). Run once with a network, "
            "so that they are in the cache, copy that cache (HF_HOME) here, or set "
            "MODEL.TIMM.PRETRAINED False and give a file of this model's weights as MODEL.WEIGHTS."
        ) from error
    for module in net.modules():
        if type(module).__name__ in ("SwinTransformerBlock", "SwinTransformerV2Block"):
            module._attn = MethodType(_pad_then_shift, module)
    converters = {
        "BN": lambda net: net,
        "FrozenBN": timm.layers.freeze_batch_norm_2d,
        "SyncBN": timm.layers.convert_sync_batchnorm,
    }
    require("MODEL.TIMM.NORM", norm, norm in converters, f"one of {', '.join(converters)}")
    return converters[norm](net)


def _pad_then_shift(block: Any, x: Tensor) -> Tensor:
    """The windowed attention of a Swin block, (B, H, W, C), on maps that windows do not divide.

    timm shifts such a map before padding it, so that rows shifted from the top to the bottom share
    windows with the bottom rows, without an attention mask between them. Here, as in the original
    (Liu et al., ICCV 2021), the map is padded first. On other maps nothing changes.
    """
    height, width = x.shape[1:3]
    window_height, window_width = block.window_size
    padding = (0, 0, 0, -width % window_width, 0, -height % window_height)
    return type(block)._attn(block, F.pad(x, padding))[:, :height, :width].contiguous()


def _accepted_options(timm: Any, name: str, drop_path: float) -> dict[str, bool | float]:
    """Those of our options that the model's class accepts."""
    try:
        with torch.device("meta"):  # builds the model without memory, to learn its class
            net = timm.create_model(name)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}: {str(error).rstrip('.')}. timm.list_models() returns "
            f"the names that timm {timm.__version__} knows, timm.list_pretrained() those of weights"
        ) from error
    accepted = inspect.signature(type(net)).parameters
    fixed = net.pretrained_cfg["fixed_input_size"]
    if fixed and not accepted.keys() & {"dynamic_img_size", "strict_img_size"}:
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}, which takes images of one size only; choose a model "
            "that takes any, such as a ResNet, a ConvNeXt, a Swin or a vit_*."
        )
    options: dict[str, Any] = {k: value for k, value in _ANY_SIZE.items() if k in accepted}
    require("MODEL.TIMM.DROP_PATH", drop_path, 0 <= drop_path < 1, "at least 0 and below 1")
    if "drop_path_rate" in accepted:
        options["drop_path_rate"] = drop_path  # 0 too: the default of some models is higher
    elif drop_path:
        raise ConfigError(f"MODEL.TIMM.DROP_PATH: {name!r} has no stochastic depth: set it to 0.")
    return options


def to_own_names(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Rename a file's weights to the names in a model with a timm backbone, whose are ``own``.

    Recognizes timm's names and those of the authors' files (Swin, DINOv2), with or without the
    prefix "backbone.", and Mask2Former's Swin. Other names are kept.
    """
    if not any(name.startswith(NET) for name in own):
        return dict(state)
    if f"{BACKBONE}{_ORIGINAL_SWIN}" in state or _ORIGINAL_SWIN in state:
        state = {
            renamed(name, _FROM_ORIGINAL_SWIN): value
            for name, value in state.items()
            if not name.endswith(_COMPUTED)
        }
    inside = {name: NET + name.removeprefix(BACKBONE) for name in state}
    moved = {name: new for name, new in inside.items() if name not in own and new in own}
    return {moved.get(name, name): value for name, value in state.items()}


def to_mask2former_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a model with timm's Swin to Mask2Former's names.

    Mask2Former's files also contain buffers, which it can compute. Names of other models are kept:
    Mask2Former has no other timm backbone.
    """
    if _TIMM_SWIN not in state:
        return dict(state)
    return {renamed(name, _TO_MASK2FORMER): value for name, value in state.items()}
