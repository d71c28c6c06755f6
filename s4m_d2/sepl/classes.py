"""The classes of label maps: VOC 2012's, COCO 2014's, or a user's own; and their colors."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog

from s4m_d2.errors import DatasetError, InputError

MAX_CLASSES = 255  # with background: the index 255 means void
DEFAULT_PRESET = "voc"

_BACKGROUND_NAME = "background"
_VOC_THINGS = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,"
    "person,pottedplant,sheep,sofa,train,tvmonitor"
).split(",")
_NUM_COLORS = 256
_COLOR_BITS = 8


@dataclass(frozen=True)
class LabelClasses:
    """Names of the classes 0, 1, ... of a label map; 255 is void and no class.

    Attributes:
        names: the first is "background".
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.names) <= MAX_CLASSES:
            raise InputError(
                f"{len(self.names)} classes; expected 2 to {MAX_CLASSES}, with background (255 is "
                "void)"
            )
        if self.names[0] != _BACKGROUND_NAME:
            raise InputError(
                f"the first class is '{self.names[0]}'; the index 0 is the background: put "
                f"'{_BACKGROUND_NAME}' before the others"
            )
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise InputError(f"the class names {twice} stand there twice; give each class its own")

    @property
    def num_classes(self) -> int:
        """With background."""
        return len(self.names)


def _with_background(things: Sequence[str]) -> LabelClasses:
    return LabelClasses((_BACKGROUND_NAME, *things))


VOC = _with_background(_VOC_THINGS)
# COCO 2014 has the classes of 2017.
COCO = _with_background(MetadataCatalog.get("coco_2017_train").thing_classes)
PRESETS = {"voc": VOC, "coco": COCO}


def label_classes(
    preset: str | None = None,
    num_classes: int | None = None,
    names_file: str | os.PathLike[str] | None = None,
) -> LabelClasses:
    """The classes that a user names; without any argument VOC 2012's.

    Args:
        preset: a key of ``PRESETS``. Excludes the others.
        num_classes: with background; they are called "class 1", "class 2", ...
        names_file: text, a name a line, "background" first. With ``num_classes`` the two must
            agree.

    Raises:
        InputError: the arguments contradict each other, or are out of range.
        DatasetError: the file is missing, or holds no such names.
    """
    if preset is not None and (num_classes is not None or names_file is not None):
        raise InputError(
            f"the preset '{preset}' has its own classes; give it, or the number or names of yours"
        )
    if names_file is not None:
        classes = _read_names(Path(names_file))
        if num_classes not in (None, classes.num_classes):
            raise InputError(
                f"{names_file} names {classes.num_classes} classes, but their number is given as "
                f"{num_classes}; both count the background"
            )
        return classes
    if num_classes is not None:
        return _with_background([f"class {index}" for index in range(1, num_classes)])
    preset = preset or DEFAULT_PRESET
    if preset not in PRESETS:
        raise InputError(f"the preset '{preset}' is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def _read_names(path: Path) -> LabelClasses:
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} cannot be read: {error}. Give a text file with a class name a line, "
            f"'{_BACKGROUND_NAME}' first."
        ) from error
    names = tuple(line.strip() for line in lines)
    if "" in names:
        raise DatasetError(
            f"{path}: line {names.index('') + 1} is empty; a class's index is its line, from 0 on"
        )
    try:
        return LabelClasses(names)
    except InputError as error:
        raise DatasetError(f"{path}: {error}") from error


def add_class_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`classes_from` reads."""
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="voc: VOC 2012, 21 classes (default); coco: COCO 2014, 81; both with background",
    )
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="of other data, with background"
    )
    group.add_argument(
        "--class-names", type=Path, metavar="FILE", help="a name a line, 'background' first"
    )


def classes_from(args: argparse.Namespace) -> LabelClasses:
    """The classes that a command line names. Raises as :func:`label_classes`."""
    return label_classes(args.preset, args.num_classes, args.class_names)


def palette() -> np.ndarray:
    """VOC's colors of the indices 0..255, (256, 3) uint8 RGB.

    The bits of an index go to red, green and blue in turns, the lowest to the highest of each.
    """
    indices = np.arange(_NUM_COLORS)
    colors = np.zeros((_NUM_COLORS, 3), dtype=np.uint8)
    for bit in range(_COLOR_BITS):
        place = _COLOR_BITS - 1 - bit // 3
        colors[:, bit % 3] |= ((indices >> bit & 1) << place).astype(np.uint8)
    return colors
