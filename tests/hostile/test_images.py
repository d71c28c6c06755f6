"""Image files of every kind that turns up in a folder of images."""

import io
import zlib

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from helpers import save_image
from PIL import ExifTags, Image, PngImagePlugin

from s4m_d2.data.images import image_size, read_image
from s4m_d2.errors import DatasetError

from .rows import BOX_POLYGON, HEIGHT, WIDTH, labeled, mask, one_error, scene, unlabeled

SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8),
    (83, 61),
    interpolation=cv2.INTER_CUBIC,
)


def encoded(image_format, array=SMOOTH, mode=None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, image_format, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    check = zlib.crc32(name + body).to_bytes(4, "big")
    return len(body).to_bytes(4, "big") + name + body + check


def png_of(width, height, depth=8, interlaced=0, rows=b"") -> bytes:
    """A color PNG with this header, whatever its rows are."""
    sides = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    head = chunk(b"IHDR", sides + bytes([depth, 2, 0, 0, interlaced]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def xmp(orientation: int) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    return text


REFUSED = {  # content, or a way to make the path; what the message says of it
    "0 bytes": (b"", "cannot be read"),
    "truncated WebP": (encoded("WEBP", lossless=True)[:300], "cannot be read"),
    "truncated JPEG": (encoded("JPEG")[:-300], "truncated"),
    "damaged PNG": (encoded("PNG")[:900] + b"9" + encoded("PNG")[901:], "cannot be read"),
    "rows missing": (png_of(WIDTH, HEIGHT, rows=b"\0" * 9), "truncated"),
    "text": (b"left to be done\n", "cannot be read"),
    "decompression bomb": (png_of(30_000, 30_000), "pixels.*too large"),
    "no width": (png_of(0, 10), "cannot be read"),
    "16-bit gray": (encoded("PNG", np.full((4, 4), 40_000, np.uint16)), "more than 8 bits.*Scale"),
    "floats": (encoded("TIFF", np.ones((4, 4), np.float32)), "more than 8 bits"),
    "missing": (lambda path: None, "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "dangling link": (lambda path: path.symlink_to("gone.png"), "cannot be read"),
}


def test_damaged_and_foreign_files_are_refused_and_named(tmp_path):
    for number, (content, says) in enumerate(REFUSED.values()):
        path = tmp_path / f"{number}.png"
        content(path) if callable(content) else path.write_bytes(content)
        record = {"file_name": str(path), "annotations": []}
        for read in (labeled(), unlabeled(), lambda r: read_image(r["file_name"], "BGR")):
            with one_error(DatasetError, f"{path} ", says):
                read(record)
        if callable(content):
            with one_error(DatasetError, str(path)):
                image_size(str(path))


def transparent_palette(image):
    image = image.quantize(8)
    image.info["transparency"] = bytes([0, 128, 255])
    return image


# What becomes of a file of another kind: its name, how to make it, the expected pixels.
RED, BLUE = (220, 30, 30), (20, 40, 200)
READ = {
    "grayscale": ("a.png", lambda image: image.convert("L"), np.asarray(
        Image.fromarray(scene()).convert("L"))[..., None].repeat(3, axis=2)),
    "black and white": ("a.png", lambda image: Image.fromarray(mask()), np.uint8(255)
        * mask()[..., None].repeat(3, axis=2)),
    "palette with transparency": ("a.png", transparent_palette, scene()),
    "BMP": ("a.bmp", lambda image: image, scene()),
    "wrong extension": ("a.jpg", lambda image: image, scene()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Palette images")
def test_other_kinds_become_color(tmp_path):
    for name, convert, expected in READ.values():
        path = tmp_path / name
        convert(Image.fromarray(scene())).save(path, None if name.endswith(".bmp") else "PNG")
        assert np.array_equal(read_image(str(path), "RGB"), expected)
        assert np.array_equal(read_image(str(path), "BGR"), expected[..., ::-1])
        assert image_size(str(path)) == (HEIGHT, WIDTH)


def test_of_16_bits_the_upper_8_and_of_an_animation_the_first_frame_are_read(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    path = tmp_path / "a.png"
    path.write_bytes(png_of(7, 5, depth=16, rows=rows))
    assert np.array_equal(read_image(str(path), "RGB"), values >> 8)
    frames = [Image.new("RGB", (6, 4), color) for color in (RED, BLUE)]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(str(path), "RGB") == RED).all()


UNDO = (  # what a viewer turns, by orientation
    lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1],
    lambda x: x.swapaxes(0, 1), lambda x: x.swapaxes(0, 1)[::-1],
    lambda x: x[::-1, ::-1].swapaxes(0, 1), lambda x: x.swapaxes(0, 1)[:, ::-1],
)  # fmt: skip


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "XMP"])
def test_exif_orientation_turns_the_image_and_the_masks_fit_it(tmp_path, kind):
    """Annotations are in the frame of the upright image, as in Detectron2."""
    for orientation, undo in enumerate(UNDO, start=1):
        options = {"JPEG": {"exif": exif(orientation), "quality": 100}}
        options |= {"PNG": {"exif": exif(orientation)}, "XMP": {"pnginfo": xmp(orientation)}}
        path = tmp_path / ("a.jpg" if kind == "JPEG" else "a.png")
        save_image(path, np.ascontiguousarray(undo(scene())), **options[kind])
        record = {
            "file_name": str(path), "height": HEIGHT, "width": WIDTH,
            "annotations": [{"category_id": 0, "segmentation": [BOX_POLYGON]}],
        }  # fmt: skip
        sample = labeled()(record)
        red = sample["image"].permute(1, 2, 0).numpy()[..., 0] > 128
        assert image_size(str(path)) == (HEIGHT, WIDTH)
        assert np.array_equal(sample["instances"].gt_masks.tensor[0].numpy(), mask())
        assert (red != mask()).mean() < (0.05 if kind == "JPEG" else 1e-9)


def test_annotations_of_an_image_as_stored_name_its_exif_orientation(tmp_path):
    path = str(save_image(tmp_path / "a.jpg", scene(), exif=exif(6)))
    record = {"file_name": path, "annotations": [], "height": HEIGHT, "width": WIDTH}
    with one_error(DatasetError, path, "EXIF"):
        labeled()(record)
    save_image(tmp_path / "a.jpg", scene(), exif=b"Exif\0\0MM\0*\0\0\xff\xff\x01\x12")  # broken
    assert len(labeled()(record)["instances"]) == 0


CROP = [T.ResizeShortestEdge((32, 48), 96), T.RandomCrop("absolute", (24, 48))]
JITTER = [T.ResizeScale(0.1, 2.0, 64, 64), T.FixedSizeCrop((64, 64), pad=False)]
TINY, NARROW = ((1, 1), (1, 3), (2, 1), (7, 1)), ((1, 20_000), (100, 1))


@pytest.mark.parametrize(("geometry", "bad"), [(CROP, NARROW[:1]), (JITTER, NARROW)])
def test_tiny_images_are_augmented_and_too_narrow_ones_refused_and_named(tmp_path, geometry, bad):
    for size in (*TINY, *bad):
        path = save_image(tmp_path / "a.png", np.full((*size, 3), 9, dtype=np.uint8))
        for seed in range(8):  # of the last, draws above 0.8 would leave a pixel
            record = {"file_name": str(path), "seeds": {"augment": seed}}
            if size in bad:
                with one_error(DatasetError, str(path), "too narrow"):
                    unlabeled(geometry)(record)
            else:
                image = unlabeled(geometry)(record)["image"]
                assert image.shape[0] == 3 and image.numel() and (image == 9).all()
