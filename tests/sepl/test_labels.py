"""Label maps in PNG and .npy files."""

import numpy as np
import pytest
from PIL import Image

from s4m_d2.errors import DatasetError, InputError, OutputError
from s4m_d2.sepl.classes import palette
from s4m_d2.sepl.labels import read_label, write_label

LABEL = np.array([[0, 1, 20], [255, 7, 0]], dtype=np.uint8)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "below" / "label.png"
    write_label(path, LABEL)
    np.testing.assert_array_equal(read_label(path, 21), LABEL)
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image.convert("RGB")), palette()[LABEL])


def test_views_are_written_as_they_look(tmp_path):
    write_label(tmp_path / "label.png", LABEL.T)
    np.testing.assert_array_equal(read_label(tmp_path / "label.png"), LABEL.T)


@pytest.mark.parametrize("seed", range(5))
def test_any_size_and_value(seed, tmp_path):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 256, rng.integers(1, 40, 2), dtype=np.uint8)
    write_label(tmp_path / "label.png", label)
    np.testing.assert_array_equal(read_label(tmp_path / "label.png"), label)


def test_gray_files_and_foreign_palettes(tmp_path):
    Image.fromarray(LABEL).save(tmp_path / "gray.png")
    foreign = Image.fromarray(LABEL)
    foreign.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    foreign.save(tmp_path / "palette.png")
    few = Image.fromarray(np.minimum(LABEL, 3))  # of four colors: two bits a pixel
    few.putpalette(bytes(12))
    few.save(tmp_path / "few.png", bits=2)
    for name, expected in (("gray", LABEL), ("palette", LABEL), ("few", np.minimum(LABEL, 3))):
        np.testing.assert_array_equal(read_label(tmp_path / f"{name}.png"), expected)


def test_color_files_with_equal_channels(tmp_path):
    Image.fromarray(np.stack([LABEL] * 3, axis=-1)).save(tmp_path / "label.png")
    np.testing.assert_array_equal(read_label(tmp_path / "label.png"), LABEL)


@pytest.mark.parametrize("dtype", ["u1", "i2", "<i8", ">u4"])
def test_arrays_of_indices(dtype, tmp_path):
    for label in (LABEL, LABEL.T):
        np.save(tmp_path / "label.npy", label.astype(dtype))
        read = read_label(tmp_path / "label.npy", 21)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, label)
    with pytest.raises(DatasetError, match=r"label.npy has class indices \[20\]"):
        read_label(tmp_path / "label.npy", 20)


@pytest.mark.parametrize(
    "values",
    [
        LABEL.astype(float),
        LABEL == 1,
        LABEL[None],
        LABEL[0],
        LABEL.astype(int) - 1,
        LABEL.astype(int) + 1,
        LABEL[:0],
    ],
)
def test_arrays_that_are_no_indices(values, tmp_path):
    np.save(tmp_path / "label.npy", values)
    with pytest.raises(DatasetError, match=r"label\.npy"):
        read_label(tmp_path / "label.npy")


def test_an_array_of_more_than_its_file_holds_is_not_allocated(tmp_path):
    np.save(tmp_path / "label.npy", LABEL)
    content = (tmp_path / "label.npy").read_bytes()
    larger = content.replace(b"(2, 3), }" + b" " * 9, b"(200000000, 30), }", 1)
    assert len(larger) == len(content) and larger != content
    (tmp_path / "label.npy").write_bytes(larger)
    with pytest.raises(DatasetError, match=r"label\.npy cannot be read"):
        read_label(tmp_path / "label.npy")


def test_classes_beyond_the_count(tmp_path):
    path = tmp_path / "label.png"
    write_label(path, LABEL)
    read_label(path, 21)  # 20 is the last one, 255 is void
    with pytest.raises(
        DatasetError, match=r"label.png has class indices \[7, 20\].* 0\.\.6 .*Give"
    ):
        read_label(path, 7)
    write_label(path, np.full((2, 2), 254, dtype=np.uint8))
    with pytest.raises(DatasetError, match=r"\[254\]"):
        read_label(path, 254)
    read_label(path, 255)


def colors(path):
    Image.new("RGB", (3, 2), (1, 1, 2)).save(path)


def deep(path):
    Image.fromarray(LABEL.astype(np.uint16)).save(path)


def binary(path):
    Image.new("1", (3, 2)).save(path)


def jpeg(path):
    Image.fromarray(LABEL).save(path, format="JPEG")


def no_image(path):
    path.write_text("pixels")


def truncated(path):
    write_label(path, np.random.default_rng(0).integers(0, 20, (50, 50), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-300])


def without_end(path):
    """Its pixels are all there, but nothing says so."""
    write_label(path, LABEL)
    path.write_bytes(path.read_bytes()[:-12])


def one_bit_flipped(path):
    """In the compressed pixels: the size of the map stays as it is."""
    write_label(path, np.random.default_rng(0).integers(0, 20, (50, 50), dtype=np.uint8))
    damaged = bytearray(path.read_bytes())
    damaged[-400] ^= 1
    path.write_bytes(damaged)


def nothing(path):
    path.write_bytes(b"")


def absent(path):
    pass


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (colors, "is no label map: a PNG of Pillow's mode RGB.*turn colors into indices"),
        (deep, "is no label map: a PNG of Pillow's mode I"),
        (binary, "is no label map: a PNG of Pillow's mode 1"),
        (jpeg, "is no label map: a JPEG"),
        (no_image, "cannot be read.*Replace it"),
        (truncated, "cannot be read.*Replace it"),
        (without_end, "cannot be read.*Replace it"),
        (one_bit_flipped, "cannot be read.*Replace it"),
        (nothing, "cannot be read.*Replace it"),
        (absent, "does not exist"),
    ],
)
def test_files_that_are_no_label_maps(make, says, tmp_path):
    make(tmp_path / "it.png")
    with pytest.raises(DatasetError, match=f"it.png {says}"):
        read_label(tmp_path / "it.png")


@pytest.mark.parametrize("label", [LABEL[0], LABEL.astype(np.int64), LABEL == 1, LABEL[None]])
def test_arrays_that_are_no_label_maps(label, tmp_path):
    with pytest.raises(InputError, match=r"must be \(H, W\) uint8"):
        write_label(tmp_path / "label.png", label)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_label(tmp_path / "file" / "label.png", LABEL)
