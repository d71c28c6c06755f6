"""ResNet (He et al., CVPR 2016) with Detectron2's parameter names and initialization."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import BACKBONE_REGISTRY, Backbone

Norm = str | Callable[[int], nn.Module]

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BASIC_DEPTHS = (18, 34)  # the depths built of BasicBlock
_BASIC_OPTIONS = {"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1, "NUM_GROUPS": 1}
_STEM_STRIDE = 4


def _conv(in_channels: int, out_channels: int, size: int, norm: Norm, **kwargs) -> Conv2d:
    kwargs |= {"padding": kwargs.get("dilation", 1) * (size // 2), "bias": False}
    return Conv2d(in_channels, out_channels, size, norm=get_norm(norm, out_channels), **kwargs)


def _init_msra(conv: Conv2d) -> None:
    """He et al., ICCV 2015. (fvcore has it too, but importing fvcore.nn compiles and warns.)"""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


class _ResidualBlock(CNNBlockBase):
    """Convolutions conv1, conv2, … beside a shortcut, projected where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm):
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=stride)

    def _add_branch(self, *convs: Conv2d) -> None:
        self._branch = [f"conv{i}" for i in range(1, len(convs) + 1)]
        for name, conv in zip(self._branch, convs, strict=True):
            self.add_module(name, conv)
        for conv in (*convs, self.shortcut):
            if conv is not None:
                _init_msra(conv)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for name in self._branch[:-1]:
            out = F.relu_(getattr(self, name)(out))
        out = getattr(self, self._branch[-1])(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions: the block of ResNet-18 and ResNet-34."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: Norm = "BN"):
        super().__init__(in_channels, out_channels, stride, norm)
        self._add_branch(
            _conv(in_channels, out_channels, 3, norm, stride=stride),
            _conv(out_channels, out_channels, 3, norm),
        )


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
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        width, middle = bottleneck_channels, {"groups": num_groups, "dilation": dilation}
        self._add_branch(
            _conv(in_channels, width, 1, norm, stride=first),
            _conv(width, width, 3, norm, stride=second, **middle),
            _conv(width, out_channels, 1, norm),
        )


class BasicStem(CNNBlockBase):
    """A 7x7 convolution and a max-pool, with stride 4 together."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN"):
        super().__init__(in_channels, out_channels, _STEM_STRIDE)
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        _init_msra(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class ResNet(Backbone):
    """A stem and stages named res2, res3, …

    out_features: what `forward` returns, of "stem", "res2", …; by default the last stage. Stages
        above the last one named are dropped.
    freeze_at: see `freeze`.
    """

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        *,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ):
        super().__init__()
        self.stem = stem
        names = [f"res{i}" for i in range(2, len(stages) + 2)]
        if out_features is not None:
            names = names[: max(names.index(f) + 1 if f in names else 0 for f in out_features)]
        self.stage_names = tuple(names)
        self.stages = [nn.Sequential(*blocks) for blocks in stages[: len(names)]]
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        stride = stem.stride
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            self.add_module(name, stage)
            stride *= math.prod(block.stride for block in stage)
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = stage[-1].out_channels
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
        stride_per_block: Sequence[int],
        **kwargs,
    ) -> list[CNNBlockBase]:
        """Build the blocks of one stage, each with its own stride and all with `kwargs`."""
        assert len(stride_per_block) == num_blocks, f"stride_per_block needs {num_blocks} values"
        blocks = []
        for stride in stride_per_block:
            blocks.append(block_class(in_channels, out_channels, stride=stride, **kwargs))
            in_channels = out_channels
        return blocks


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT` describe."""
    options = cfg.MODEL.RESNETS
    if options.DEPTH in _BASIC_DEPTHS:
        for key, value in _BASIC_OPTIONS.items():
            assert options[key] == value, f"Depth {options.DEPTH} needs RESNETS.{key} = {value}"
    stem = BasicStem(input_shape.channels, options.STEM_OUT_CHANNELS, options.NORM)
    in_channels, out_channels = options.STEM_OUT_CHANNELS, options.RES2_OUT_CHANNELS
    width = options.NUM_GROUPS * options.WIDTH_PER_GROUP
    stages = []
    for number, num_blocks in enumerate(_BLOCKS_PER_STAGE[options.DEPTH], start=2):
        dilation = options.RES5_DILATION if number == 5 else 1
        first_stride = 1 if number == 2 or dilation > 1 else 2
        kind, extra = BasicBlock, {}
        if options.DEPTH not in _BASIC_DEPTHS:
            kind = BottleneckBlock
            extra = {
                "bottleneck_channels": width,
                "stride_in_1x1": options.STRIDE_IN_1X1,
                "dilation": dilation,
                "num_groups": options.NUM_GROUPS,
            }
        strides = [first_stride] + [1] * (num_blocks - 1)
        channels = {"in_channels": in_channels, "out_channels": out_channels}
        shared = {"norm": options.NORM, **channels, **extra}
        stages.append(ResNet.make_stage(kind, num_blocks, stride_per_block=strides, **shared))
        in_channels, out_channels, width = out_channels, 2 * out_channels, 2 * width
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=options.OUT_FEATURES, freeze_at=freeze_at)
