"""Class names, their number and their colors."""

import argparse

import numpy as np
import pytest

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sepl.classes import (
    COCO,
    VOC,
    LabelClasses,
    add_class_arguments,
    classes_from,
    label_classes,
    palette,
)


def test_the_presets_have_the_data_sets_order():
    assert VOC.num_classes == 21 and COCO.num_classes == 81
    assert VOC.names[:3] == ("background", "aeroplane", "bicycle")
    assert (VOC.names[15], VOC.names[20]) == ("person", "tvmonitor")
    assert list(VOC.names[1:]) == sorted(VOC.names[1:])
    # COCO's ids have gaps, the indices have none: traffic light is 10 in both, stop sign is not.
    assert (COCO.names[1], COCO.names[10], COCO.names[12]) == (
        "person",
        "traffic light",
        "stop sign",
    )
    assert COCO.names[80] == "toothbrush"


def test_colors_are_those_of_voc():
    """As the devkit's documentation and its files have them."""
    colors = palette()
    assert colors.shape == (256, 3) and colors.dtype == np.uint8
    known = {
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128),
        8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    assert {index: tuple(colors[index].tolist()) for index in known} == known
    assert len(np.unique(colors, axis=0)) == 256


def test_without_arguments_they_are_vocs():
    assert label_classes() is VOC
    assert label_classes("coco") is COCO


def test_numbered_classes():
    assert label_classes(num_classes=3).names == ("background", "class 1", "class 2")


def test_names_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("background\n Käse \r\ntraffic light\n\n", encoding="utf-8")
    expected = ("background", "Käse", "traffic light")
    assert label_classes(names_file=path).names == expected
    assert label_classes(num_classes=3, names_file=path).names == expected
    with pytest.raises(InputError, match="names 3 classes, but their number is given as 4"):
        label_classes(num_classes=4, names_file=path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"cat\ndog\n", "the first class is 'cat'.*put 'background' before"),
        (b"background\n\ndog\n", "line 2 is empty"),
        (b"background\ndog\ndog\n", r"\['dog'\] stand there twice"),
        (b"background\n", "1 classes; expected 2 to 255"),
        (b"", "names.txt: 0 classes; expected 2 to 255"),
        (b"\xff\xfe\x00", "names.txt cannot be read.*Give a text file"),
    ],
)
def test_files_that_name_no_classes(text, says, tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(text)
    with pytest.raises(DatasetError, match=says):
        label_classes(names_file=path)


def test_a_file_of_names_that_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match="none.txt cannot be read"):
        label_classes(names_file=tmp_path / "none.txt")


@pytest.mark.parametrize("number", [-1, 0, 1, 256])
def test_numbers_out_of_range(number):
    with pytest.raises(InputError, match="expected 2 to 255"):
        label_classes(num_classes=number)


@pytest.mark.parametrize("number", [2, 255])
def test_the_range_is_closed(number):
    assert label_classes(num_classes=number).num_classes == number


def test_contradictions_and_unknown_presets():
    with pytest.raises(InputError, match="the preset 'voc' has its own classes"):
        label_classes("voc", num_classes=21)
    with pytest.raises(InputError, match="'ade' is unknown; there are voc, coco"):
        label_classes("ade")
    with pytest.raises(InputError, match="first class is 'cat'"):
        LabelClasses(("cat", "dog"))


def test_the_options_name_the_same(tmp_path):
    (tmp_path / "names").write_text("background\ncar")
    parser = argparse.ArgumentParser()
    add_class_arguments(parser)
    for words, expected in (
        ([], VOC),
        (["--preset", "coco"], COCO),
        (["--num-classes", "5"], label_classes(num_classes=5)),
        (["--class-names", str(tmp_path / "names")], LabelClasses(("background", "car"))),
    ):
        assert classes_from(parser.parse_args(words)) == expected
