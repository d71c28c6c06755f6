"""A short description of the machine and the libraries, for the log."""

from __future__ import annotations

import importlib
import os
import platform
from importlib import metadata

import torch
from tabulate import tabulate

__all__ = ["collect_env_info"]

_LIBRARIES = ("numpy", "torchvision", "fvcore", "iopath", "pycocotools", "Pillow")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def collect_env_info() -> str:
    """A table of the interpreter, the libraries and the devices."""
    detectron2 = importlib.import_module("detectron2")
    location = os.path.dirname(detectron2.__file__)
    rows = [
        ("platform", platform.platform()),
        ("Python", platform.python_version()),
        ("detectron2", f"{detectron2.__version__} @{location}"),
        ("PyTorch", f"{torch.__version__} (CUDA {torch.version.cuda or 'no'})"),
        ("CPU threads", torch.get_num_threads()),
        ("GPU available", torch.cuda.is_available()),
    ]
    for index in range(torch.cuda.device_count()):
        rows.append((f"GPU {index}", torch.cuda.get_device_name(index)))
    rows += [(name, _version(name)) for name in _LIBRARIES]
    return tabulate(rows)
