"""What the tests of `sepl enhance` share: folders of labels and masks drawn by hand, and runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from s4m_d2.sepl.cli import main
from s4m_d2.sepl.labels import read_label, write_label

SIZE = (6, 8)
CAM = (slice(1, 3), slice(1, 3))  # 4 pixels of a class
MASK = (slice(1, 4), slice(1, 3))  # 6 pixels: o_s 4/6
CLASS = 3


def drawn(window, value=1, size=SIZE) -> np.ndarray:
    """Zeros, and ``value`` in a window."""
    label = np.zeros(size, dtype=np.uint8)
    label[window] = value
    return label


def rle(window, size=SIZE) -> dict:
    """A mask as JSON has it."""
    encoded = mask_utils.encode(np.asfortranarray(drawn(window, size=size)))
    return {"size": list(size), "counts": encoded["counts"].decode()}


def make_folders(root: Path, names=("a", "b", "c")) -> Path:
    """``cam``, ``masks`` and ``images`` of a few images, all of the same content."""
    (root / "masks").mkdir(parents=True)
    (root / "images").mkdir()
    for name in names:
        write_label(root / "cam" / f"{name}.png", drawn(CAM, CLASS))
        (root / "masks" / f"{name}.json").write_text(json.dumps([rle(MASK)]))
        Image.new("RGB", SIZE[::-1]).save(root / "images" / f"{name}.jpg")
    return root


def arguments(root: Path, *more: str, output: str = "out") -> list[str]:
    """The command line for such folders."""
    given = ["--pseudo-labels", str(root / "cam"), "--output", str(root / output)]
    masks = [] if "--sam" in more else ["--masks", str(root / "masks")]
    return [*given, *masks, *more]


def enhance(root: Path, *more: str, output: str = "out") -> int:
    """Run the command; its exit status."""
    return main(arguments(root, *more, output=output))


def report(root: Path, output: str = "out") -> dict:
    """The JSON report."""
    return json.loads((root / output / "sepl.json").read_text())


def label(root: Path, name: str, output: str = "out") -> np.ndarray:
    """An enhanced label map."""
    return read_label(root / output / f"{name}.png")


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
