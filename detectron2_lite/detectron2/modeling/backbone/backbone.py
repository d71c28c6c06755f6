"""What every backbone offers."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod

from detectron2.layers import ShapeSpec
from torch import Tensor, nn


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
        return {
            name: ShapeSpec(channels=channels[name], stride=strides[name])
            for name in self._out_features
        }
