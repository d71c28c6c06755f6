"""A short description of the machine and the libraries, for the log."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from tabulate import tabulate

__all__ = ["collect_env_info"]

_LIBRARIES = ("numpy", "torchvision", "fvcore", "iopath", "pycocotools")


def collect_env_info() -> str:
    """A table of the interpreter, the libraries and the devices."""
    import detectron2

    rows = [
        ("platform", platform.platform()),
        ("Python", platform.python_version()),
        ("detectron2", f"{detectron2.__version__} @{detectron2.__path__[0]}"),
        ("PyTorch", f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})"),
        *((f"GPU {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())),
        *((name, metadata.version(name)) for name in _LIBRARIES),
    ]
    return tabulate(rows)
