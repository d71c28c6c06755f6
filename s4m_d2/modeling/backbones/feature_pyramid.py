"""Maps of several strides from the one map of a plain ViT (ViTDet, Li et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

VIT_EPS = 1e-6  # of ViTDet's layer norms


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W) maps, at each position."""

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        return super().forward(channels_last).permute(0, 3, 1, 2).contiguous()


class SimpleFeaturePyramid(nn.Module):
    """Compute maps of several strides from a map of one stride.

    Finer maps come from 2 x 2 transposed convolutions, each of which halves the channels, with a
    layer norm and a GELU between two of them; coarser ones from 2 x 2 max-pooling. A 1 x 1 and a
    3 x 3 convolution, each followed by a layer norm, then give every map the same channels.

    Args:
        in_channels: channels of the map; a multiple of 2 for each halving.
        stride: of the map, in pixels of the image; a power of two.
        out_strides: powers of two.
        out_channels: channels of the returned maps.
    """

    def __init__(
        self, *, in_channels: int, stride: int, out_strides: Sequence[int], out_channels: int
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                *_resample(in_channels, stride, out_stride),
                *_project(_channels(in_channels, stride, out_stride), out_channels),
            )
            for out_stride in out_strides
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_channels, H, W) -> [(B, out_channels, H · stride / s, W · stride / s)], s each of
        ``out_strides``."""
        return [level(x) for level in self.levels]


def _channels(in_channels: int, stride: int, out_stride: int) -> int:
    return in_channels * min(out_stride, stride) // stride


def _resample(channels: int, stride: int, out_stride: int) -> list[nn.Module]:
    if out_stride >= stride:
        factor = out_stride // stride
        return [nn.MaxPool2d(2) for _ in range(factor.bit_length() - 1)]
    layers: list[nn.Module] = []
    while stride > out_stride:
        if layers:
            layers += [ChannelNorm(channels, eps=VIT_EPS), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels, stride = channels // 2, stride // 2
    return layers


def _project(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        ChannelNorm(out_channels, eps=VIT_EPS),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        ChannelNorm(out_channels, eps=VIT_EPS),
    ]


def resize_to_grid(images: Tensor, *, patch: int, stride: int) -> Tensor:
    """Resize images so that one patch of a ViT covers ``stride`` x ``stride`` pixels of them.

    (B, C, H, W), H and W multiples of ``stride`` -> (B, C, H · patch / stride, W · patch / stride),
    bilinear with antialiasing.
    """
    if patch == stride:
        return images
    size = [side // stride * patch for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
