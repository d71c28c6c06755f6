"""Which rows of a batch are worth computing: on a GPU all of them, on the CPU the ones in use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def rows_to_compute(flags: Tensor) -> Tensor:
    """Indices of the (N,) bool ``flags`` for which something must be computed, int64.

    To look at a flag costs nothing on the CPU, where computing is dear. A GPU would have to be
    waited for, and computes the rest in less time: there all rows are named.
    """
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return torch.arange(len(flags), device=flags.device)
