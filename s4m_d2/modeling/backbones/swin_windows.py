"""timm's Swin blocks on maps whose sides are not multiples of the window.

timm shifts such a map before padding it, so that rows shifted from the top to the bottom share
windows with the bottom rows, without an attention mask between them. Here, as in the original (Liu
et al., ICCV 2021), the map is padded first. On other maps nothing changes.

Imports timm: import this module only where timm is needed.
"""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F


class _PadsFirst:
    """Mixin for timm's blocks, without state."""

    window_size: tuple[int, int]

    def _attn(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        padding = (0, 0, 0, -width % window_width, 0, -height % window_height)
        attended = super()._attn(F.pad(x, padding))  # type: ignore[misc]  # the block's
        return attended[:, :height, :width].contiguous()


class PaddedSwinBlock(_PadsFirst, SwinTransformerBlock):
    """A Swin block that pads, then shifts."""


class PaddedSwinV2Block(_PadsFirst, SwinTransformerV2Block):
    """A Swin v2 block that pads, then shifts."""


_PADDED = {SwinTransformerBlock: PaddedSwinBlock, SwinTransformerV2Block: PaddedSwinV2Block}


def pad_before_shift(net: nn.Module) -> None:
    """Make all Swin blocks of a model pad before they shift, in place; weights keep their names."""
    for module in net.modules():
        module.__class__ = _PADDED.get(type(module), type(module))
