"""Folders of images: what is listed and what is left out, and images of the validation set."""

import os
import socket

import cv2
import numpy as np
import pytest
from PIL import Image

from s4m_d2.data import images
from s4m_d2.data.images import IMAGE_EXTENSIONS, list_images, unlabeled_records
from s4m_d2.errors import DatasetError


def list_unlabeled(folder, val_folder="", val=()):
    validation = {f"{val_folder}/{name}": name for name in val}
    return images.list_unlabeled(folder, "frames", validation=validation, labeled=())


def write(folder, files):
    """Files by path, with these contents."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def test_each_real_folder_is_visited_once_and_nothing_hidden_or_special_is_opened(
    tmp_path, monkeypatch
):
    odd = os.fsdecode(b"new\nline\x1b[31m\xe9.tif")
    seen = ["2.JPG", "b/1.png", "b/c/3.webp", "b/c/4.jfif", odd]
    hidden = [".DS_Store", "._2.jpg", ".ipynb_checkpoints/2.jpg", "__MACOSX/2.jpg", "b/.4.png"]
    folder = write(tmp_path / "unl", dict.fromkeys([*seen, *hidden, "Thumbs.db", "b/a.txt"], b""))
    write(tmp_path, {"beside.png": b"", "linked/5.png": b"", "linked/deep/6.png": b""})
    os.mkfifo(f"{folder}/pipe.png")
    monkeypatch.chdir(folder)  # a socket's path has to be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    links = {
        "a": "b", "b/loop": "..", "b/up": "../..", "b/root": "/", "x": "../linked",
        "y": "../linked", "p.png": "pipe.png", "broken.png": "gone.png", "self.png": "self.png",
    }  # fmt: skip
    for name, target in links.items():
        os.symlink(target, name)
    os.symlink(folder, tmp_path / "linked" / "back")

    kept, left_out = list_unlabeled(folder)
    assert kept == sorted([*seen, "broken.png", "self.png", "x/5.png", "x/deep/6.png"])
    assert left_out == {}
    paths = [os.path.join(folder, name) for name in kept]
    assert list_images(folder, IMAGE_EXTENSIONS, "") == paths
    assert [record["image_id"] for record in unlabeled_records(paths, folder)] == kept


def test_names_of_uploads_are_found(tmp_path):
    folder = write(
        tmp_path, dict.fromkeys(["My photo (1).jpg", "b+c.png", "b c.png", "bc.png"], b"")
    )
    for given, name in (
        ("upload/3/0a1b2c3d-My_photo_1.jpg", "My photo (1).jpg"),
        ("b c.png", "b c.png"),
        ("x/BC.png", ""),  # of two: b+c.png and bc.png
    ):
        assert images.find_below(folder, given) == name


def test_what_commands_wrote_into_the_folder_is_no_image_of_it(tmp_path):
    files = ["a.png", "b/2.png", "b/run.json", "mine/predictions.json", "mine/3.png"]
    written = [
        *("out/run.json", "out/config.yaml", "out/student/figures/arp_0000002.png"),
        *("labels/.label.json", "labels/review/0001.png"),
        *("demo/predictions.json", "demo/images.json", "demo/overlays/a.png"),
    ]
    folder = write(tmp_path, dict.fromkeys([*files, *written], b""))
    assert list_unlabeled(folder) == (["a.png", "b/2.png", "mine/3.png"], {})
    overlays = os.path.join(folder, "demo")  # asked for by name
    assert len(list_images(overlays, IMAGE_EXTENSIONS, "")) == 1


def test_a_folder_without_images_is_refused_and_the_option_named(tmp_path, caplog):
    for files in ({}, {".hidden/1.png": b"", "a.txt": b"", "b.HEIC": b""}, None):
        folder = str(tmp_path / "none") if files is None else write(tmp_path, files)
        with pytest.raises(DatasetError, match="--unlabeled"):
            list_unlabeled(folder)
    assert "1 .heic" in caplog.text  # a picture that somebody may miss
    with pytest.raises(DatasetError, match="is no folder"):
        list_unlabeled(f"{tmp_path}/a.txt")


def long(middle, size=100_000):
    """Bytes that differ in the middle alone."""
    return middle.center(size, b"-")


UNLABELED = {"s1/rgb.jpg": b"A", "s2/rgb.jpg": b"BB", "s3/rgb.jpg": b"CC", "long.bmp": long(b"AA"),
             "empty.jpg": b"", "a b_png.rf.01ab.jpg": b"FFF"}  # fmt: skip
HELD_OUT = {  # files of the validation set, and what is left out for them
    "stems and sizes repeat": ({"s8/rgb.jpg": b"D", "s9/rgb.jpg": b"EE"}, set()),
    "same path, written otherwise": ({"./s1//rgb.jpg": b"another picture"}, {"s1/rgb.jpg"}),
    "renamed copies": ({"1.jpg": b"CC", "2.png": b"DD", "3.bmp": long(b"AA")},
                       {"s3/rgb.jpg", "long.bmp"}),
    "long files that differ": ({"1.bmp": long(b"AB"), "2.bmp": b"x" + long(b"AA")[1:]}, set()),
    "copies by Roboflow, named so": (
        {"a b.png": b"1111", "v/rgb_jpg.rf.23cd.jpg": b"22222", "long.png": b"333"},
        {"a b_png.rf.01ab.jpg", "s1/rgb.jpg", "s2/rgb.jpg", "s3/rgb.jpg"}),
    "another of the name": ({"a b.jpg": b"1111"}, set()),
    "missing, empty": ({"gone.jpg": None, "void.jpg": b""}, {"empty.jpg"}),
}  # fmt: skip


@pytest.mark.parametrize("case", HELD_OUT)
def test_validation_images_are_recognized_by_path_content_or_names_of_copies(tmp_path, case):
    files, expected = HELD_OUT[case]
    folder = write(tmp_path / "unl", UNLABELED)
    there = {name: content for name, content in files.items() if content is not None}
    val = write(tmp_path / "val", there)
    kept, left_out = list_unlabeled(folder, val, files)
    assert set(kept) == set(UNLABELED) - expected
    assert sum(left_out.values()) == len(expected)


def test_validation_images_in_the_folder_itself_are_left_out_but_never_all(tmp_path):
    folder = write(tmp_path, {"labeled/1.png": b"A", "labeled/2.png": b"B", "more/1.png": b"C"})
    kept, _ = list_unlabeled(folder, f"{folder}/labeled", ["1.png"])
    assert kept == ["labeled/2.png", "more/1.png"]
    with pytest.raises(DatasetError, match="all of them labeled or in the validation"):
        list_unlabeled(folder, f"{folder}/labeled", ["1.png", "2.png", "../more/1.png"])


def test_color_of_16_bits_is_read_by_its_upper_half_and_that_of_12_is_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 1 << 16, (5, 6, 3), dtype=np.uint16)
    for name in ("full.png", "full.tiff"):
        cv2.imwrite(str(tmp_path / name), values)
        upper = images.read_image(str(tmp_path / name), "BGR")
        np.testing.assert_array_equal(upper, values >> 8)
        cv2.imwrite(str(tmp_path / name), values >> 4)
        with pytest.raises(DatasetError, match="16-bit"):
            images.read_image(str(tmp_path / name), "BGR")
    Image.new("RGB", (6, 5)).save(tmp_path / "black.png")  # of 8 bits
    assert not images.read_image(str(tmp_path / "black.png"), "RGB").any()
