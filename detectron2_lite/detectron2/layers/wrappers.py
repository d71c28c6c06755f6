"""torch's functions and layers under Detectron2's names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d as BatchNorm2d
from torch.nn import Linear as Linear
from torch.nn.functional import interpolate as interpolate


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat that returns a single tensor as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Indices of the nonzero entries, one (N,) tensor for each dimension."""
    return x.nonzero(as_tuple=True)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """Move `src` to the device of `dst`."""
    return src.to(dst.device)


class Conv2d(nn.Conv2d):
    """nn.Conv2d, then `norm` (a module), then `activation` (a callable), where given."""

    def __init__(self, *args, norm: nn.Module | None = None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)
