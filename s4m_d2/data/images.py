"""Reading images, whole or only their size, with errors that name the file."""

from __future__ import annotations

import numpy as np
from detectron2.data import detection_utils
from PIL import Image

from s4m_d2.data.decoding import decode_plain, orientation
from s4m_d2.errors import DatasetError

#: What Pillow raises for a damaged, truncated or foreign file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_DEEP_MODES = ("I", "F")  # Pillow's modes of more than 8 bits begin with these
_EXIF_SOURCES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
# What turns an image of this EXIF orientation upright.
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)  # of them, those that swap height and width


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Decode an image as 8-bit color and turn it upright, as its EXIF data say.

    Gray and palette images become color, transparency is dropped, and of several frames the first
    is read. Of color images with 16 bits a channel the upper 8 are kept; gray ones of more than 8
    bits are refused, because what range their values have is not known.

    Args:
        file_name: path.
        image_format: "RGB" or "BGR", the order of the channels returned.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        DatasetError: the file is missing, damaged, truncated, no image, or of more than 8 bits.
    """
    try:
        with Image.open(file_name) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise DatasetError(
                    f"{file_name} has gray values of more than 8 bits (Pillow's mode {image.mode})."
                    " Scale them to 0..255 and save the image with 8 bits a channel."
                )
            plain = decode_plain(image, file_name, image_format)
            if plain is not None:
                return plain
            image.load()  # asking a damaged PNG for its orientation first would hide the damage
            turn = _TURNS.get(orientation(image))
            upright = image if turn is None else image.transpose(turn)
            array = detection_utils.convert_PIL_to_numpy(upright, image_format)
    except DatasetError:  # which is a ValueError too
        raise
    except READ_ERRORS as error:
        raise unreadable(file_name, error) from error
    return np.ascontiguousarray(array)


def image_size(file_name: str) -> tuple[int, int]:
    """(H, W) of an image turned upright, from its header alone.

    Raises:
        DatasetError: the file is missing or its header is damaged.
    """
    try:
        with Image.open(file_name) as image:
            width, height = image.size
            # Asking a PNG without these for its orientation would decode all of it.
            described = any(source in image.info for source in _EXIF_SOURCES)
            if described and orientation(image) in _TRANSPOSED:
                width, height = height, width
    except READ_ERRORS as error:
        raise unreadable(file_name, error) from error
    return height, width


def is_turned(file_name: str) -> bool:
    """Whether the EXIF data of an image that can be read swap its height and width."""
    with Image.open(file_name) as image:
        return orientation(image) in _TRANSPOSED


def unreadable(file_name: str, error: Exception) -> DatasetError:
    """The error for a file that exists in a listing but cannot be used."""
    if isinstance(error, FileNotFoundError):
        return DatasetError(
            f"{file_name} does not exist. Complete the data set, or take the file out of the list."
        )
    if isinstance(error, Image.DecompressionBombError):
        return DatasetError(
            f"{file_name} is too large: {error} Scale the image down, or cut it into pieces."
        )
    return DatasetError(
        f"{file_name} cannot be read: {error}. The file is damaged, truncated or of another "
        "format. Replace it with a fresh copy."
    )
