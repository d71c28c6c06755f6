"""What OpenCV decodes is what Pillow would have decoded, and damage is seen as before."""

import io
import zlib
from unittest import mock

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from s4m_d2.data import images
from s4m_d2.data.images import read_image
from s4m_d2.errors import DatasetError


def smooth(height=61, width=83, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(smooth()).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, body):
    check = zlib.crc32(name + body).to_bytes(4, "big")
    return len(body).to_bytes(4, "big") + name + body + check


def with_chunk(name, body):
    """A PNG with one more chunk before its pixels."""
    content = encoded("PNG")
    place = content.index(b"IDAT") - 4
    return content[:place] + chunk(name, body) + content[place:]


def interlaced():
    """A PNG of one pixel, all of which is in the first of Adam7's passes."""
    parts = (
        (b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 2, 0, 0, 1])),
        (b"IDAT", zlib.compress(bytes([0, 10, 20, 30]))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def described():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    return text


PLAIN = {
    "PNG": encoded("PNG"),
    "gray PNG": encoded("PNG", "L"),
    "PNG of many chunks": encoded("PNG", compress_level=0),
    "PNG with gamma": with_chunk(b"gAMA", (45455).to_bytes(4, "big")),
    "PNG with another gamma": with_chunk(b"gAMA", (20000).to_bytes(4, "big")),
    "PNG with resolution": encoded("PNG", dpi=(72, 72)),
    "JPEG": encoded("JPEG"),
    "JPEG without subsampling": encoded("JPEG", subsampling=0, quality=95),
    "JPEG 4:2:2": encoded("JPEG", subsampling=1, quality=40),
    "progressive JPEG": encoded("JPEG", progressive=True),
    "gray JPEG": encoded("JPEG", "L"),
    "JPEG with EXIF": encoded("JPEG", exif=exif(1)),
}
OTHER = {
    "RGBA": encoded("PNG", "RGBA"),
    "palette": encoded("PNG", "P"),
    "black and white": encoded("PNG", "1"),
    "PNG with orientation": encoded("PNG", exif=exif(6)),
    "PNG with orientation in a text": encoded("PNG", pnginfo=described()),
    "interlaced PNG": interlaced(),
    "PNG with transparency": with_chunk(b"tRNS", bytes(6)),
    "JPEG with orientation": encoded("JPEG", exif=exif(6)),
    "CMYK": encoded("JPEG", "CMYK"),
    "WebP": encoded("WEBP", lossless=True),
    "bytes after the end": encoded("PNG") + b"more",
}


def by_pillow(path, image_format):
    with mock.patch.object(images, "decode_plain", return_value=None):
        return read_image(path, image_format)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_pixels_are_pillow_s(tmp_path, image_format):
    for name, content in {**PLAIN, **OTHER}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with Image.open(path) as image:
            plain = images.decode_plain(image, str(path), image_format)
        assert (plain is not None) == (name in PLAIN), name  # by OpenCV, which is faster
        array = read_image(str(path), image_format)
        expected = by_pillow(str(path), image_format)
        assert array.dtype == np.uint8 and array.flags.c_contiguous
        assert np.array_equal(array, expected), name


def outcome(read, path):
    try:
        return read(str(path), "RGB").tobytes()
    except DatasetError as error:
        return str(error)


@pytest.mark.parametrize("name", ["PNG", "gray PNG", "JPEG", "progressive JPEG", "gray JPEG"])
def test_damaged_files_are_read_or_refused_as_by_pillow(tmp_path, name):
    rng = np.random.default_rng(0)
    content, path = PLAIN[name], tmp_path / "image"
    ends = (*range(0, len(content), max(1, len(content) // 60)), len(content) - 1)
    damaged = [content[:end] for end in ends]
    for number in range(100):
        changed = bytearray(content)
        place = rng.integers(len(content))
        if number % 2:
            changed[place] ^= 1 << rng.integers(8)
        else:
            changed[place : place + 9] = rng.bytes(9)
        damaged.append(bytes(changed))
    refused = 0
    for each in damaged:
        path.write_bytes(each)
        result = outcome(read_image, path)
        assert result == outcome(by_pillow, path)
        refused += isinstance(result, str)
    assert refused > 50
