"""Layers with Detectron2's conventions."""

from .batch_norm import FrozenBatchNorm2d, get_norm
from .blocks import CNNBlockBase, ShapeSpec
from .wrappers import BatchNorm2d, Conv2d, Linear, cat, interpolate, move_device_like, nonzero_tuple

# fmt: off
__all__ = [
    "BatchNorm2d", "CNNBlockBase", "Conv2d", "FrozenBatchNorm2d", "Linear", "ShapeSpec",
    "cat", "get_norm", "interpolate", "move_device_like", "nonzero_tuple",
]
