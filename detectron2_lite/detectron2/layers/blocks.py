"""The base of convolutional blocks, and the shapes that they exchange."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .batch_norm import FrozenBatchNorm2d


@dataclass
class ShapeSpec:
    """What is known of a feature map: channels, size in pixels, stride to the input image."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class CNNBlockBase(nn.Module):
    """A block with a known number of input channels, output channels and a stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self) -> CNNBlockBase:
        """Stop gradients to all parameters, turn BatchNorm into FrozenBatchNorm; return self."""
        self.requires_grad_(False)
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self
