"""Label maps as PNG files: a class index a pixel, with VOC's colors."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from s4m_d2.data.images import READ_ERRORS, unreadable
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.files import atomic_write
from s4m_d2.sepl.classes import MAX_CLASSES, palette
from s4m_d2.sepl.enhancement import VOID

_INDEX_MODES = ("P", "L")  # Pillow's names of palette and gray images


def read_label(path: str | os.PathLike[str], num_classes: int | None = None) -> np.ndarray:
    """Read a label map, of which the palette's colors do not matter.

    Args:
        path: PNG with a palette, or gray with 8 bits.
        num_classes: with background; indices from it on are refused, but 255, which is void. None:
            not checked.

    Returns:
        (H, W) uint8, as stored: orientations in EXIF data are not followed.

    Raises:
        DatasetError: the file is missing, damaged, no PNG of that kind, or has other classes.
    """
    try:
        with Image.open(path) as image:
            image.verify()  # checksums, which decoding alone does not look at
        with Image.open(path) as image:
            if image.format != "PNG" or image.mode not in _INDEX_MODES:
                raise DatasetError(
                    f"{path} is no label map: a {image.format} of Pillow's mode {image.mode}. "
                    "Expected a PNG with a palette, or gray with 8 bits, whose values are class "
                    "indices; turn colors into indices first."
                )
            label = np.array(image)
    except DatasetError:
        raise
    except READ_ERRORS as error:
        raise unreadable(str(path), error) from error
    if num_classes is not None:
        _check_classes(path, label, num_classes)
    return label


def _check_classes(path: str | os.PathLike[str], label: np.ndarray, num_classes: int) -> None:
    found = np.flatnonzero(np.bincount(label.ravel(), minlength=MAX_CLASSES + 1))
    unknown = found[(found >= num_classes) & (found != VOID)]
    if len(unknown):
        raise DatasetError(
            f"{path} has class indices {unknown.tolist()}, but there are {num_classes} classes, "
            f"0..{num_classes - 1} with background, and {VOID} for void. Give the classes that the "
            "labels were made with (of commands: --preset, --num-classes or --class-names)."
        )


def write_label(path: str | os.PathLike[str], label: np.ndarray) -> None:
    """Write a label map as a PNG with VOC's palette, never half of it.

    Args:
        path: of the file; its folder is made where it is missing.
        label: (H, W) uint8.

    Raises:
        InputError: the array is of another shape or dtype.
        OutputError: the system refuses to write.
    """
    if label.ndim != 2 or label.dtype != np.uint8:
        raise InputError(f"label must be (H, W) uint8, got {label.shape} {label.dtype}")
    image = Image.fromarray(np.ascontiguousarray(label))
    image.putpalette(palette().tobytes())
    with atomic_write(path, "wb") as file:
        image.save(file, format="PNG")
