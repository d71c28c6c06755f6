"""Folders of small label maps, masks and images, and the command `s4m-sepl` on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from helpers import rle_of
from PIL import Image

from s4m_d2.commands.sepl import main


def save_png(path: Path, values, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(path, "PNG")
    return path


def save_labels(folder: Path, labels: dict) -> Path:
    for name, label in labels.items():
        save_png(folder / f"{name}.png", label)
    return folder


def save_masks(folder: Path, masks: dict) -> Path:
    """A JSON file of RLEs per image."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_image in masks.items():
        (folder / f"{name}.json").write_text(json.dumps([rle_of(mask) for mask in of_image]))
    return folder


def sepl(*words: object) -> int:
    """Run the command; its exit status."""
    return main([str(word) for word in words])
