"""Copies between host and device: every synchronization of a training step is a call from here."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

TO_HOST = "s4m_d2::to_host"  # the name of a call in a profile


def to_device(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor, array, number or nested list of the host to ``device``; no synchronization."""
    tensor = torch.as_tensor(values, dtype=dtype)
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copy tensors of one device to the host in one transfer. Synchronizes once.

    The arrays are not to be written to: on the CPU they share the tensors' memory.
    """
    with record_function(TO_HOST):
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return [tensor.detach().numpy() for tensor in tensors]
        parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors]
        packed = torch.cat(parts).cpu()
        split = packed.split([len(part) for part in parts])
        return [
            part.clone().view(tensor.dtype).view(tensor.shape).numpy()  # aligned by the copy
            for part, tensor in zip(split, tensors, strict=True)
        ]
