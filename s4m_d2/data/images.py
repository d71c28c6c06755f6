"""Reading images, whole or only their size, with errors that name the file."""

from __future__ import annotations

import numpy as np
from detectron2.data import detection_utils
from PIL import ExifTags, Image

from s4m_d2.errors import DatasetError

#: What Pillow raises for a damaged, truncated or foreign file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_FIRST_TRANSPOSED = 5  # EXIF orientations 5 to 8 swap height and width


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Decode an image and turn it upright.

    Args:
        file_name: path.
        image_format: "RGB" or "BGR", the order of the channels returned.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        DatasetError: the file is missing, damaged, truncated or no image.
    """
    try:
        image = detection_utils.read_image(file_name, format=image_format)
    except READ_ERRORS as error:
        raise unreadable(file_name, error) from error
    return np.ascontiguousarray(image)


def image_size(file_name: str) -> tuple[int, int]:
    """(H, W) of an image turned upright, from its header alone.

    Raises:
        DatasetError: the file is missing or its header is damaged.
    """
    try:
        with Image.open(file_name) as image:
            width, height = image.size
            # Without this check, asking a PNG for its orientation would decode all of it.
            exif = image.getexif() if "exif" in image.info else {}
            if exif.get(ExifTags.Base.Orientation, 1) >= _FIRST_TRANSPOSED:
                width, height = height, width
    except READ_ERRORS as error:
        raise unreadable(file_name, error) from error
    return height, width


def unreadable(file_name: str, error: Exception) -> DatasetError:
    """The error for a file that exists in a listing but cannot be used."""
    if isinstance(error, FileNotFoundError):
        return DatasetError(
            f"{file_name} does not exist. Complete the data set, or take the file out of the list."
        )
    return DatasetError(
        f"{file_name} cannot be read: {error}. The file is damaged, truncated or of another "
        "format; replace it with a fresh copy."
    )
