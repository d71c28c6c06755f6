"""Image files of every kind that turns up in a folder of images."""

import io
import struct
import zlib

import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import ExifTags, Image, PngImagePlugin

from s4m_d2.data.images import image_size, read_image
from s4m_d2.errors import DatasetError

from .rows import BOX_POLYGON, HEIGHT, WIDTH, labeled, mask, one_error, save, scene, unlabeled


def encoded(image_format, array=None, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene() if array is None else array).save(buffer, image_format, **options)
    return buffer.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def png_of(width, height, depth=8, color=2, rows=b"") -> bytes:
    """A PNG with this header, whatever its rows are."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def gray16() -> bytes:
    return encoded("PNG", np.full((HEIGHT, WIDTH), 40_000, dtype=np.uint16))


REFUSED = {  # file name, content, what the message says of it
    "0 bytes": ("a.png", b"", "cannot be read"),
    "truncated WebP": ("a.webp", half(encoded("WEBP")), "cannot be read"),
    "header alone": ("a.png", encoded("PNG")[:40], "cannot be read"),
    "rows missing": ("a.png", png_of(WIDTH, HEIGHT, rows=b"\0" * 9), "truncated"),
    "text named .png": ("a.png", b"left to be done\n", "cannot be read"),
    "decompression bomb": ("a.png", png_of(30_000, 30_000), "pixels.*too large"),
    "no width": ("a.png", png_of(0, 10), "cannot be read"),
    "16-bit gray": ("a.png", gray16(), "more than 8 bits.*Scale"),
    "32-bit integers": ("a.tiff", encoded(
        "TIFF", np.full((4, 4), 70_000, dtype=np.int32)), "more than 8 bits.*Scale"),
    "floats": ("a.tif", encoded("TIFF", np.ones((4, 4), dtype=np.float32)), "more than 8 bits"),
}  # fmt: skip


def test_damaged_and_foreign_files_are_refused_and_named(tmp_path):
    for name, content, says in REFUSED.values():
        path = tmp_path / name
        path.write_bytes(content)
        record = {"file_name": str(path), "annotations": []}
        for read in (labeled(), unlabeled(), lambda r: read_image(r["file_name"], "BGR")):
            with one_error(DatasetError, f"{path} ", says):
                read(record)


def folder_named_like_an_image(folder):
    (folder / "street.png").mkdir()
    return folder / "street.png"


def dangling_link(folder):
    (folder / "link.png").symlink_to(folder / "gone.png")
    return folder / "link.png"


@pytest.mark.parametrize(
    "make", [lambda folder: folder / "gone.png", folder_named_like_an_image, dangling_link]
)
def test_paths_that_are_no_files_are_refused_and_named(tmp_path, make):
    path = make(tmp_path)
    for read in (labeled(), unlabeled(), lambda r: image_size(r["file_name"])):
        with one_error(DatasetError, str(path)):
            read({"file_name": str(path), "annotations": []})


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


@pytest.mark.parametrize("row", READ)
@pytest.mark.filterwarnings("ignore:Palette images")
def test_other_kinds_become_color(tmp_path, row):
    name, convert, expected = READ[row]
    path = tmp_path / name
    image = convert(Image.fromarray(scene()))
    image.save(path, None if name.endswith(".bmp") else "PNG")
    assert np.array_equal(read_image(str(path), "RGB"), expected)
    assert np.array_equal(read_image(str(path), "BGR"), expected[..., ::-1])
    assert image_size(str(path)) == (HEIGHT, WIDTH)


def test_color_of_16_bits_keeps_the_upper_8(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(png_of(7, 5, depth=16, rows=rows))
    assert np.array_equal(read_image(str(tmp_path / "a.png"), "RGB"), values >> 8)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in (RED, BLUE)]
    path = tmp_path / "a.png"
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(str(path), "RGB") == RED).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "XMP"])
def test_exif_orientation_turns_the_image_and_the_masks_fit_it(tmp_path, kind):
    for orientation in range(1, 9):
        """Annotations are in the frame of the upright image, as in Detectron2."""
        undo = (  # what a viewer turns
            lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1], lambda x: x[::-1],
            lambda x: x.swapaxes(0, 1), lambda x: x.swapaxes(0, 1)[::-1],
            lambda x: x[::-1, ::-1].swapaxes(0, 1), lambda x: x.swapaxes(0, 1)[:, ::-1],
        )  # fmt: skip
        exif, text = Image.Exif(), PngImagePlugin.PngInfo()
        exif[ExifTags.Base.Orientation] = orientation
        text.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
        options = {"JPEG": {"exif": exif, "quality": 100}, "PNG": {"exif": exif}}
        path = tmp_path / ("a.jpg" if kind == "JPEG" else "a.png")
        stored = np.ascontiguousarray(undo[orientation - 1](scene()))
        save(path, stored, **options.get(kind, {"pnginfo": text}))
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
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = str(save(tmp_path / "a.jpg", scene(), exif=exif))
    record = {"file_name": path, "annotations": [], "height": HEIGHT, "width": WIDTH}
    with one_error(DatasetError, path, "EXIF"):
        labeled()(record)


def test_broken_exif_data_are_ignored(tmp_path):
    save(tmp_path / "a.jpg", scene(), exif=b"Exif\0\0MM\0*\0\0\xff\xff\x01\x12")
    assert image_size(str(tmp_path / "a.jpg")) == (HEIGHT, WIDTH)
    assert read_image(str(tmp_path / "a.jpg"), "RGB").shape == (HEIGHT, WIDTH, 3)


GEOMETRIES = {
    "resize and crop": [T.ResizeShortestEdge((32, 48), 96), T.RandomCrop("absolute", (24, 48))],
    "large-scale jitter": [T.ResizeScale(0.1, 2.0, 64, 64), T.FixedSizeCrop((64, 64), pad=False)],
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tiny_images_are_augmented(tmp_path, geometry):
    for size in ((1, 1), (1, 3), (2, 1), (7, 1)):
        path = save(tmp_path / "a.png", np.full((*size, 3), 9, dtype=np.uint8))
        for seed in range(20):
            record = {"file_name": str(path), "seeds": {"augment": seed}}
            image = unlabeled(GEOMETRIES[geometry])(record)["image"]
            assert image.shape[0] == 3 and image.numel() and (image == 9).all()


@pytest.mark.parametrize(
    ("geometry", "size"),
    [
        ("resize and crop", (20_000, 1)),
        ("large-scale jitter", (1, 20_000)),
        ("large-scale jitter", (100, 1)),  # though draws above 0.8 would leave a pixel
    ],
)
def test_images_too_narrow_to_resize_are_refused_and_named(tmp_path, geometry, size):
    path = save(tmp_path / "a.png", np.full((*size, 3), 9, dtype=np.uint8))
    for seed in range(8):
        with one_error(DatasetError, str(path), "too narrow"):
            unlabeled(GEOMETRIES[geometry])({"file_name": str(path), "seeds": {"augment": seed}})
