"""Folders of small label maps, masks and images, and the command `s4m-sepl` on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from helpers import rle_of
from PIL import Image

from s4m_d2.commands.sepl import main
from s4m_d2.sepl.files import read_label

SIZE = (6, 8)
CAM = (slice(1, 3), slice(1, 3))  # 4 pixels of a class
MASK = (slice(1, 4), slice(1, 3))  # 6 pixels: o_s 4/6, o_p 1
CLASS = 3


def drawn(window, value=1, size=SIZE) -> np.ndarray:
    """(H, W) uint8 zeros, and ``value`` in a window."""
    label = np.zeros(size, dtype=np.uint8)
    label[window] = value
    return label


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


def make_folders(root: Path, names="abc") -> Path:
    """``cam``, ``masks`` and ``images`` of a few images, all of the same content."""
    save_labels(root / "cam", {name: drawn(CAM, CLASS) for name in names})
    save_masks(root / "masks", {name: [drawn(MASK)] for name in names})
    for name in names:
        save_png(root / "images" / f"{name}.png", np.zeros((*SIZE, 3)))
    return root


def sepl(*words: object) -> int:
    """Run the command; its exit status."""
    return main([str(word) for word in words])


def arguments(root: Path, *more: object, output: str = "out") -> list[object]:
    """Those of `enhance` for such folders."""
    masks = [] if "--sam" in more else ["--masks", root / "masks"]
    return ["--pseudo-labels", root / "cam", "--output", root / output, *masks, *more]


def enhance(root: Path, *more: object, output: str = "out") -> int:
    return sepl(*arguments(root, *more, output=output))


def label(root: Path, name: str, output: str = "out") -> np.ndarray:
    """An enhanced label map."""
    return read_label(root / output / f"{name}.png")
