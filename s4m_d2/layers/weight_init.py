"""Initial weights."""

from __future__ import annotations

from torch import nn


def xavier_fill(conv: nn.Conv2d) -> None:
    """Draw uniform weights with variance 1 / fan-in, zero bias ("XavierFill" in Mask2Former).

    As ``fvcore.nn.weight_init.c2_xavier_fill``, whose package warns on import with new versions of
    PyTorch.
    """
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
