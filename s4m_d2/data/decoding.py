"""Decoding by OpenCV, which takes less time than Pillow, of files that both decode alike."""

from __future__ import annotations

import struct

import cv2
import numpy as np
from PIL import ExifTags, Image

_COLOR = {"RGB": cv2.IMREAD_COLOR_RGB, "BGR": cv2.IMREAD_COLOR_BGR}
_UPRIGHT = (None, 1)  # EXIF's numbers of an image that is stored upright
_JPEG_END = b"\xff\xd9"
# Of a PNG: where things stand, and the chunks that tell neither orientation nor transparency
# nor further frames. Texts may tell an orientation.
_PNG_FIRST_CHUNK, _PNG_DEPTH, _PNG_INTERLACED = 8, 24, 28
_CHUNK_HEAD = struct.Struct(">I4s")
_CHUNK_CHECKSUM = 4
_PNG_CHUNKS = {b"IHDR", b"IDAT", b"IEND", b"pHYs", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"iCCP"}


def decode_plain(image: Image.Image, file_name: str, image_format: str) -> np.ndarray | None:
    """Decode a PNG or JPEG file of 8 bits a channel, gray or color, stored upright and whole.

    The pixels are Pillow's: PNG is lossless, and for JPEG both use libjpeg-turbo with its defaults.

    Args:
        image: Pillow's, of which the header alone has been read.
        file_name: its path.
        image_format: "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8, or None where the file is of another kind or damaged: Pillow decides then.
    """
    is_plain = {"PNG": _is_plain_png, "JPEG": _is_plain_jpeg}.get(image.format)
    if is_plain is None or image.mode not in ("RGB", "L"):
        return None
    content = np.fromfile(file_name, dtype=np.uint8)
    if not is_plain(image, content):
        return None
    try:
        array = cv2.imdecode(content, _COLOR[image_format] | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # larger than OpenCV allows
        return None
    return array if array is not None and array.shape[:2] == image.size[::-1] else None


def _is_plain_png(image: Image.Image, content: np.ndarray) -> bool:
    """Damage of the pixels shows in the chunks' checksums, which OpenCV verifies."""
    names = set()
    start = _PNG_FIRST_CHUNK
    while start + _CHUNK_HEAD.size <= len(content):
        length, name = _CHUNK_HEAD.unpack_from(content, start)
        names.add(name)
        start += _CHUNK_HEAD.size + length + _CHUNK_CHECKSUM
    is_whole = start == len(content) and b"IEND" in names
    is_common = content[_PNG_DEPTH] == 8 and not content[_PNG_INTERLACED]
    return is_whole and is_common and names <= _PNG_CHUNKS


def _is_plain_jpeg(image: Image.Image, content: np.ndarray) -> bool:
    """OpenCV fills up what is missing of a truncated file, which has no end marker."""
    return content[-len(_JPEG_END) :].tobytes() == _JPEG_END and orientation(image) in _UPRIGHT


def orientation(image: Image.Image) -> int | None:
    """EXIF's number, 1 to 8, if there is one."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many kinds on broken EXIF data, which Detectron2 ignores
        return None
