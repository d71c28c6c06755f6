"""Cityscapes folders with missing, foreign or mismatched files."""

import shutil

import numpy as np
import pytest
from helpers import save_image
from PIL import ExifTags, Image

from s4m_d2.data import CityscapesFormat
from s4m_d2.errors import DatasetError

from .rows import HEIGHT, WIDTH, labeled, mask, one_error, scene

STEM = "aachen/aachen_000000_000019"
CAR = 26


@pytest.fixture
def load(tmp_path):
    """Changes to (image file, id file, root) -> the record of the only image."""
    image = save_image(tmp_path / "left" / f"{STEM}_leftImg8bit.png", scene())
    ids = save_image(tmp_path / "fine" / f"{STEM}_gtFine_instanceIds.png", ids_of(CAR * 1000))

    def read(change):
        change(image, ids, tmp_path)
        dataset = CityscapesFormat(str(tmp_path / "left"), str(tmp_path / "fine"))
        ((record,), _) = dataset.load(sorted)
        return labeled()(record)["instances"]

    return read


def ids_of(value, dtype=np.uint16):
    return np.where(mask(), value, 7).astype(dtype)


def ids_become(array, kind="PNG"):
    return lambda image, ids, root: Image.fromarray(array).save(ids, kind)


MALFORMED = {
    "no partner": (lambda image, ids, root: ids.unlink(), "instanceIds.png cannot be read"),
    "other size": (ids_become(ids_of(7)[:, 1:]), r"\(24, 39\), but its image .*\(24, 40\)"),
    "unknown class": (ids_become(ids_of(49_001)), "id 49001, but Cityscapes has no class 49"),
    "negative id": (ids_become(ids_of(-5, np.int32), "TIFF"), "id -5, but .* has no class -5"),
    "file of labels": (ids_become(ids_of(CAR, np.uint8)), "Ids.png must have .* 16 bits.*mode L"),
    "floats": (ids_become(ids_of(7, np.float32), "TIFF"), "one channel of integer ids.*mode F"),
    "no folder of ids": (
        lambda image, ids, root: shutil.rmtree(root / "fine"), "fine does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("row", MALFORMED)
def test_malformed_folders_are_refused_and_the_file_named(load, tmp_path, row):
    change, says = MALFORMED[row]
    with one_error(DatasetError, str(tmp_path), says):
        load(change)


SOUND = {
    "as it is": (lambda image, ids, root: None, 1),
    "32 bits": (ids_become(ids_of(CAR * 1000, np.int32), "TIFF"), 1),
    "a group": (ids_become(ids_of(CAR)), 0),
    "license plate": (ids_become(ids_of(-1, np.int32), "TIFF"), 0),
}  # fmt: skip


@pytest.mark.parametrize("row", SOUND)
def test_what_is_unusual_but_sound_is_read(load, row):
    change, count = SOUND[row]
    instances = load(change)
    assert len(instances) == count
    for found in instances.gt_masks.tensor.numpy():
        assert np.array_equal(found, mask())


def test_exif_orientation_turns_images_and_ids_alike(load):
    for orientation, turns in ((3, 2), (6, 1), (8, 3)):  # quarter turns that undo it
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation

        def turn(image, ids, root, turns=turns, exif=exif):
            for path, array in ((image, scene()), (ids, ids_of(CAR * 1000))):
                save_image(path, np.ascontiguousarray(np.rot90(array, turns)), exif=exif)

        assert np.array_equal(load(turn).gt_masks.tensor[0].numpy(), mask())
    with one_error(DatasetError, "instanceIds.png", rf"\({HEIGHT}, {WIDTH}\)"):
        load(lambda image, ids, root: save_image(image, scene(), exif=exif))  # ids are as stored
