"""What every backbone offers, and backbones by name."""

from abc import ABCMeta, abstractmethod

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import Tensor, nn

BACKBONE_REGISTRY = Registry("BACKBONE")  # called with the config and the input's ShapeSpec


class Backbone(nn.Module, metaclass=ABCMeta):
    """Maps images to named feature maps.

    A subclass sets `_out_features`, `_out_feature_channels` and `_out_feature_strides`, or
    overrides `output_shape`.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) images -> feature maps by name."""

    @property
    def size_divisibility(self) -> int:
        """What the image's sides must be a multiple of; 0: anything goes."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further demands on padding: "size_divisibility", "square_size"."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature map that `forward` returns."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {f: ShapeSpec(channels=channels[f], stride=strides[f]) for f in self._out_features}


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build `cfg.MODEL.BACKBONE.NAME`; the input has len(PIXEL_MEAN) channels by default."""
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)(cfg, input_shape)
    assert isinstance(backbone, Backbone)
    return backbone
