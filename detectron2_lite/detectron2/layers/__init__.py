"""Layers with Detectron2's conventions."""

from .batch_norm import FrozenBatchNorm2d, get_norm
from .blocks import CNNBlockBase, ShapeSpec
from .wrappers import Conv2d

__all__ = ["CNNBlockBase", "Conv2d", "FrozenBatchNorm2d", "ShapeSpec", "get_norm"]
