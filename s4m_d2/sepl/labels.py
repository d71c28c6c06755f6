"""Label maps in files: a class index per pixel; written as PNGs with VOC's colors."""

from __future__ import annotations

import argparse
import os
import pickle

import numpy as np
from PIL import Image

from s4m_d2.command_line import share
from s4m_d2.data.images import READ_ERRORS, unreadable
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.files import atomic_write
from s4m_d2.restricted_pickle import UnsafePickleError, load_arrays
from s4m_d2.sepl.cam_scores import BACKGROUND_SCORE, label_of_scores
from s4m_d2.sepl.classes import MAX_CLASSES, palette
from s4m_d2.sepl.enhancement import VOID

_INDEX_MODES = ("P", "L", "RGB")  # Pillow's names of palette, gray and color images
_NPY = ".npy"


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """How pseudo-labels are named and read: ``--suffix`` and ``--background-score``."""
    parser.add_argument(
        "--suffix",
        default="",
        metavar="S",
        help="of the pseudo-labels' names: with _pseudo NAME_pseudo.png is that of the image NAME",
    )
    parser.add_argument(
        "--background-score",
        type=share,
        default=BACKGROUND_SCORE,
        metavar="X",
        help="of pseudo-labels that are CAM scores: a pixel has a class where its score exceeds "
        "this; default: %(default)s",
    )


def read_label(
    path: str | os.PathLike[str],
    num_classes: int | None = None,
    background_score: float = BACKGROUND_SCORE,
) -> np.ndarray:
    """Read a label map.

    Args:
        path: PNG with a palette, of which the colors do not matter, gray with 8 bits, or RGB with
            three equal channels; or ``.npy``: (H, W) integers, or the CAM scores of
            :mod:`s4m_d2.sepl.cam_scores`.
        num_classes: with background; indices from it on are refused, but 255, which is void. None:
            not checked.
        background_score: of :func:`~s4m_d2.sepl.cam_scores.label_of_scores`.

    Returns:
        (H, W) uint8, as stored: orientations in EXIF data are not followed.

    Raises:
        DatasetError: the file is missing, damaged, of another kind, or has other classes.
    """
    try:
        if os.fspath(path).lower().endswith(_NPY):
            label = _read_npy(path, background_score)
        else:
            label = _read_png(path)
    except DatasetError:
        raise
    except UnsafePickleError as error:
        raise DatasetError(
            f"{path} is refused: {error}. Expected class indices, or a dictionary of CAM scores; "
            "no code of the file was run. Save the arrays alone."
        ) from error
    except (*READ_ERRORS, pickle.UnpicklingError) as error:
        raise unreadable(str(path), error) from error
    if num_classes is not None:
        _check_classes(path, label, num_classes)
    return label


def _read_png(path: str | os.PathLike[str]) -> np.ndarray:
    with Image.open(path) as image:
        image.verify()  # checksums, which decoding alone does not look at
    with Image.open(path) as image:
        mode, is_known = image.mode, image.format == "PNG" and image.mode in _INDEX_MODES
        label = np.array(image) if is_known else None
    if label is not None and label.ndim == 3:
        label = label[..., 0] if (label == label[..., :1]).all() else None
    if label is None:
        raise DatasetError(
            f"{path} is no label map: a {image.format} of Pillow's mode {mode}. Expected a PNG "
            "with a palette, gray with 8 bits, or RGB with equal channels, whose values are class "
            "indices; turn colors into indices first."
        )
    return label


def _read_npy(path: str | os.PathLike[str], background_score: float) -> np.ndarray:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        *_, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            try:
                return label_of_scores(load_arrays(file), background_score)
            except DatasetError as error:
                raise DatasetError(f"{path} is no file of CAM scores: {error}.") from error
    values = np.load(path, mmap_mode="r")  # nothing is allocated before the file is long enough
    if values.ndim != 2 or dtype.kind not in "iu" or values.min() < 0 or values.max() > VOID:
        raise DatasetError(
            f"{path} is no label map: {values.shape} {dtype}. Expected (H, W) integers in "
            f"0..{VOID}, or a dictionary of CAM scores."
        )
    return values.astype(np.uint8)


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
