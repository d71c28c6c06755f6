"""ResNet (He et al., CVPR 2016) with Detectron2's parameter names and initialization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone
from .build import BACKBONE_REGISTRY

Norm = str | Callable[[int], nn.Module]

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BASIC_DEPTHS = (18, 34)  # the depths built of BasicBlock
_BASIC_RES2_CHANNELS = 64
_STEM_STRIDE = 4
_LINEAR_INIT_STD = 0.01
_PER_BLOCK = "_per_block"


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: Norm, **kwargs) -> Conv2d:
    padding = kwargs.get("dilation", 1) * (kernel_size // 2)
    layer = get_norm(norm, out_channels)
    return Conv2d(
        in_channels, out_channels, kernel_size, padding=padding, bias=False, norm=layer, **kwargs
    )


class _ResidualBlock(CNNBlockBase):
    """A residual branch of convolutions and a shortcut, projected where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm):
        super().__init__(in_channels, out_channels, stride)
        projected = in_channels != out_channels
        self.shortcut = (
            _conv(in_channels, out_channels, 1, norm, stride=stride) if projected else None
        )

    def _branch(self) -> tuple[Conv2d, ...]:
        raise NotImplementedError

    def _init_weights(self) -> None:
        for conv in (*self._branch(), self.shortcut):
            if conv is not None:
                c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self._branch()
        out = x
        for conv in inner:
            out = F.relu_(conv(out))
        out = last(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions: the block of ResNet-18 and ResNet-34."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN"):
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        self._init_weights()

    def _branch(self) -> tuple[Conv2d, ...]:
        return self.conv1, self.conv2


class BottleneckBlock(_ResidualBlock):
    """1x1, 3x3, 1x1 convolutions: the block of ResNet-50, 101 and 152.

    `stride_in_1x1` puts the stride into the first convolution (MSRA) and not into the 3x3 one
    (torchvision); `dilation` and `num_groups` are those of the 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ):
        super().__init__(in_channels, out_channels, stride, norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.conv1 = _conv(in_channels, width, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(
            width, width, 3, norm, stride=stride_3x3, groups=num_groups, dilation=dilation
        )
        self.conv3 = _conv(width, out_channels, 1, norm)
        self._init_weights()

    def _branch(self) -> tuple[Conv2d, ...]:
        return self.conv1, self.conv2, self.conv3


class BasicStem(CNNBlockBase):
    """A 7x7 convolution and a max-pool, with stride 4 together."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN"):
        super().__init__(in_channels, out_channels, _STEM_STRIDE)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class ResNet(Backbone):
    """A stem, stages named res2, res3, …, and a classifier if `num_classes` is given.

    out_features: what `forward` returns, of "stem", "res2" … "res5", "linear"; by default the
        last layer. Stages above the last one named are dropped.
    freeze_at: see `freeze`.
    """

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ):
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes
        if out_features is not None:
            names = [f"res{i}" for i in range(2, len(stages) + 2)]
            stages = stages[: max(names.index(f) + 1 if f in names else 0 for f in out_features)]
        self.stages = [nn.Sequential(*blocks) for blocks in stages]
        self.stage_names = tuple(f"res{i}" for i in range(2, len(self.stages) + 2))
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        stride, channels = stem.stride, stem.out_channels
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            self.add_module(name, stage)
            stride *= math.prod(block.stride for block in stage)
            channels = stage[-1].out_channels
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=_LINEAR_INIT_STD)
        children = [name for name, _ in self.named_children()]
        self._out_features = children[-1:] if out_features is None else out_features
        for name in self._out_features:
            assert name in children, f"no layer {name!r}; available: {', '.join(children)}"
        self.freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) images -> the `out_features`, each (N, C', H/stride, W/stride)."""
        assert x.dim() == 4, f"ResNet takes an input of shape (N, C, H, W). Got {x.shape} instead!"
        x = self.stem(x)
        outputs = {"stem": x}
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            x = outputs[name] = stage(x)
        if self.num_classes is not None:
            outputs["linear"] = self.linear(torch.flatten(self.avgpool(x), 1))
        return {name: x for name, x in outputs.items() if name in self._out_features}

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Freeze the stem (`freeze_at` >= 1) and the first `freeze_at` - 1 stages; return self."""
        if freeze_at >= 1:
            self.stem.freeze()
        for stage in self.stages[: max(freeze_at - 1, 0)]:
            for block in stage:
                block.freeze()
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase],
        num_blocks: int,
        *,
        in_channels: int,
        out_channels: int,
        **kwargs,
    ) -> list[CNNBlockBase]:
        """Build the blocks of one stage.

        An argument `x_per_block` gives each block its own value of `x`; others go to all blocks.
        """
        per_block = {k: v for k, v in kwargs.items() if k.endswith(_PER_BLOCK)}
        shared = {k: v for k, v in kwargs.items() if k not in per_block}
        for key, values in per_block.items():
            name = key.removesuffix(_PER_BLOCK)
            assert len(values) == num_blocks, f"{key} needs {num_blocks} values, got {len(values)}"
            assert name not in shared, f"make_stage cannot take both {key} and {name}"
        blocks = []
        for i in range(num_blocks):
            own = {key.removesuffix(_PER_BLOCK): values[i] for key, values in per_block.items()}
            blocks.append(block_class(in_channels, out_channels, **own, **shared))
            in_channels = out_channels
        return blocks


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT` describe."""
    options = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, options.STEM_OUT_CHANNELS, options.NORM)
    _check(options)
    basic = options.DEPTH in _BASIC_DEPTHS
    in_channels, out_channels = options.STEM_OUT_CHANNELS, options.RES2_OUT_CHANNELS
    width = options.NUM_GROUPS * options.WIDTH_PER_GROUP
    stages = []
    for number, num_blocks in enumerate(_BLOCKS_PER_STAGE[options.DEPTH], start=2):
        dilation = options.RES5_DILATION if number == 5 else 1
        first_stride = 1 if number == 2 or dilation > 1 else 2
        bottleneck = {
            "bottleneck_channels": width,
            "stride_in_1x1": options.STRIDE_IN_1X1,
            "dilation": dilation,
            "num_groups": options.NUM_GROUPS,
        }
        blocks = ResNet.make_stage(
            BasicBlock if basic else BottleneckBlock,
            num_blocks,
            in_channels=in_channels,
            out_channels=out_channels,
            stride_per_block=[first_stride] + [1] * (num_blocks - 1),
            norm=options.NORM,
            **({} if basic else bottleneck),
        )
        stages.append(blocks)
        in_channels, out_channels, width = out_channels, 2 * out_channels, 2 * width
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=options.OUT_FEATURES, freeze_at=freeze_at)


def _check(options: CfgNode) -> None:
    """Refuse combinations that no ResNet has, and deformable convolutions."""
    assert options.RES5_DILATION in (1, 2), f"RES5_DILATION cannot be {options.RES5_DILATION}"
    if any(options.DEFORM_ON_PER_STAGE):
        raise NotImplementedError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE: deformable convolutions need Detectron2 itself; "
            "set all four to False or install Detectron2"
        )
    if options.DEPTH in _BASIC_DEPTHS:
        channels = options.RES2_OUT_CHANNELS
        assert channels == _BASIC_RES2_CHANNELS, (
            f"depth {options.DEPTH} needs MODEL.RESNETS.RES2_OUT_CHANNELS = "
            f"{_BASIC_RES2_CHANNELS}, got {channels}"
        )
        assert options.RES5_DILATION == 1, f"depth {options.DEPTH} needs RES5_DILATION = 1"
        assert options.NUM_GROUPS == 1, f"depth {options.DEPTH} needs NUM_GROUPS = 1"
