"""Folders of small label maps for the tests of the commands, and the command line itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image


def write_labels(folder: Path, labels: dict[str, np.ndarray]) -> Path:
    """Gray PNGs, which need no flush to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, label in labels.items():
        Image.fromarray(np.asarray(label, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def write_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """Smooth images of sizes (H, W)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, (height, width)) in enumerate(sizes.items()):
        y, x = np.mgrid[:height, :width]
        channels = [
            255 * x / width,
            255 * y / height,
            np.full((height, width), 40.0 * number % 256),
        ]
        Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def command(module: ModuleType, *arguments: object) -> int:
    """Exit status of a command's module for its arguments."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(argument) for argument in arguments]))
