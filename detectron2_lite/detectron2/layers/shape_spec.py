"""Shapes of feature maps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ShapeSpec:
    """What is known of a feature map: channels, size in pixels, stride to the input image."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
