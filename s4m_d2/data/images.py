"""Reads images, or only their sizes, with errors that name the file.

Plain files are decoded by OpenCV, which is faster, all others by Pillow.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

import cv2
import numpy as np
from detectron2.data import detection_utils
from PIL import ExifTags, Image

from s4m_d2.errors import DatasetError

#: What Pillow raises for a damaged, truncated or foreign file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_EXIF_SOURCES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
# Transposition for each EXIF orientation of an image that is not stored upright.
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,  # from here on, height and width are swapped
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bytes that may follow 0xff in the pixels of a JPEG: 0 (0xff is a value), restarts, and the start
# of another scan of a progressive image.
_SCAN_CODES = (0x00, *range(0xD0, 0xD8), 0xC4, 0xDA)
_JPEG_SCAN, _JPEG_END = 0xFFDA, 0xD9
# Chunks of a PNG without orientation (texts may have it), transparency or further frames.
_PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"iCCP"}


@contextlib.contextmanager
def open_image(file_name: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image with Pillow; its errors in the block become a DatasetError with the name."""
    try:
        with Image.open(file_name) as image:
            yield image
    except DatasetError:  # which is a ValueError too
        raise
    except READ_ERRORS as error:
        raise unreadable(str(file_name), error) from error


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Decode an image as 8-bit color and rotate it according to its EXIF data.

    Gray and palette images become color, transparency is dropped, and of several frames the first
    is read. Of color images with 16 bits per channel the upper 8 are kept; gray ones of more than 8
    bits are refused, because the range of their values is not known.

    Returns (H, W, 3) uint8, contiguous, in ``image_format``, "RGB" or "BGR".

    Raises:
        DatasetError: the file is missing, damaged, not an image, or has more than 8 bits.
    """
    with open_image(file_name) as image:
        if image.mode.startswith(("I", "F")):
            raise DatasetError(
                f"{file_name} has gray values of more than 8 bits (Pillow's mode {image.mode})."
                " Scale them to 0..255 and save the image with 8 bits per channel."
            )
        array = decode_plain(image, file_name, image_format)
        if array is None:
            image.load()  # before reading the orientation, which would hide damage of a PNG
            turn = _TURNS.get(orientation(image))
            upright = image if turn is None else image.transpose(turn)
            array = detection_utils.convert_PIL_to_numpy(upright, image_format)
    return np.ascontiguousarray(array)


def image_size(file_name: str) -> tuple[int, int]:
    """(H, W) of an image after EXIF rotation, from its header; DatasetError: it is damaged."""
    with open_image(file_name) as image:
        width, height = image.size
        # Reading the orientation of a PNG without these would decode all of it.
        is_described = any(source in image.info for source in _EXIF_SOURCES)
        is_transposed = is_described and orientation(image) in (5, 6, 7, 8)
    return (width, height) if is_transposed else (height, width)


def decode_plain(image: Image.Image, file_name: str, image_format: str) -> np.ndarray | None:
    """Decode an intact PNG or JPEG file of 8 bits per channel, gray or color, stored upright.

    The pixels equal Pillow's: PNG is lossless, and for JPEG both use libjpeg-turbo with its
    defaults. None if the file is of another kind or damaged: Pillow then decodes or refuses it.
    """
    is_plain = {"PNG": _is_plain_png, "JPEG": _is_plain_jpeg}.get(image.format or "")
    if is_plain is None or image.mode not in ("RGB", "L"):
        return None
    content = np.fromfile(file_name, dtype=np.uint8)
    if not is_plain(content) or (image.format == "JPEG" and orientation(image) in _TURNS):
        return None
    try:
        array = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # larger than OpenCV allows
        return None
    if array is None or array.shape[:2] != image.size[::-1]:
        return None
    return array if image_format == "BGR" else cv2.cvtColor(array, cv2.COLOR_BGR2RGB, dst=array)


def _is_plain_png(content: np.ndarray) -> bool:
    """Whether all chunks are known and whole; their checksums are verified by OpenCV."""
    names = set()
    start = 8  # after the signature
    while start + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content.data, start)
        names.add(name)
        start += length + 12  # with the head and a checksum
    is_whole = start == len(content) and b"IEND" in names
    is_common = content[24] == 8 and not content[28]  # bits a channel; interlaced
    return is_whole and is_common and names <= _PNG_CHUNKS


def _is_plain_jpeg(content: np.ndarray) -> bool:
    """Whether there are no unexpected markers, and an end: OpenCV fills in missing pixels."""
    start = 2  # after the signature
    while start + 4 <= len(content):
        marker, length = struct.unpack_from(">HH", content.data, start)
        start += length + 2  # with the marker
        if marker == _JPEG_SCAN:
            break
    pixels = content[start:]
    codes = pixels[1:][pixels[:-1] == 0xFF]  # what follows each byte that begins a marker
    is_whole = codes.size > 0 and codes[-1] == _JPEG_END and pixels[-1] == _JPEG_END
    return bool(is_whole and np.isin(codes[:-1], _SCAN_CODES).all())


def orientation(image: Image.Image) -> int | None:
    """EXIF orientation, 1 to 8; None: not given."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many kinds on broken EXIF data, which Detectron2 ignores
        return None


def unreadable(file_name: str, error: Exception) -> DatasetError:
    """Make the error for a listed file that cannot be used."""
    remedy = "Replace it with a fresh copy; cut an image that is too large."
    return DatasetError(f"{file_name} cannot be read: {error}. {remedy}")
