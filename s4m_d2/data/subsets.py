"""Choice of images: a fixed share of a set, a list of file names, a validation split."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set

from s4m_d2.data.cityscapes import IMAGE_SUFFIX, INSTANCE_SUFFIX
from s4m_d2.data.listing import IMAGE_EXTENSIONS
from s4m_d2.errors import DatasetError, InputError, first_names, require
from s4m_d2.files import read_lines

_KEY_BYTES = 16
_DECIMALS = 6  # removes the floating-point error of fraction * count before rounding
_MOST_FOR_CLASSES = 2  # factor by which a validation split may grow to contain each class
_COPY = re.compile(r"\.rf\.\w+(?=\.\w+$)")  # Roboflow's, in the names of augmented copies


def name_key(name: str, key: bytes = b"") -> bytes:
    """Sort key of a name for a fixed pseudo-random order."""
    return hashlib.blake2b(name.encode(), key=key, digest_size=_KEY_BYTES).digest()


def photograph(name: str) -> str:
    """Make the name that the augmented copies of a photograph share; other names stay.

    >>> photograph("a/cat_jpg.rf.0f1e2d3c.jpg")
    'a/cat_jpg.jpg'
    """
    return _COPY.sub("", name)


def _share(fraction: float, count: int) -> int:
    """fraction * count, rounded half up, at least 1."""
    return max(1, math.floor(round(fraction * count, _DECIMALS) + 0.5))


def stable_subset(names: Sequence[str], fraction: float, seed: int) -> list[str]:
    """Choose a share of a data set by ``seed``, sorted, the same on every machine.

    The names whose base names have the smallest BLAKE2b hashes, keyed with the seed, are chosen,
    whatever folder and order they have. A smaller fraction is a subset of a larger one.

    Args:
        names: file names or paths with different base names.
        fraction: in (0, 1]; fraction * len(names) is rounded half up, to at least 1.

    Raises:
        DatasetError: ``names`` is empty or two base names are equal.

    >>> stable_subset(["a/1.png", "a/2.png", "b/3.png", "b/4.png"], 0.5, seed=0)
    ['a/1.png', 'b/3.png']
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be in (0, 1], got {fraction}.")
    if not names:
        raise DatasetError("There are no images to draw a labeled split from.")
    _refuse_duplicates([os.path.basename(name) for name in names], "The data set")
    seed_bytes = str(seed).encode()
    ordered = sorted(names, key=lambda name: name_key(os.path.basename(name), seed_bytes))
    return sorted(ordered[: _share(fraction, len(names))])


def read_split_file(path: str) -> list[str]:
    """Read the stems of the file names in a text file, in its order.

    One name per line, with or without folder, extension and ``_leftImg8bit`` or
    ``_gtFine_instanceIds`` (published lists of Cityscapes). ``#`` starts a comment.

    Raises:
        DatasetError: the file is missing, empty or not text, or lists a name twice.
    """
    list_of_images = f"The list of labeled images {path}"
    lines = (line.split("#")[0].strip() for line in read_lines(path))
    stems = [stem(line) for line in lines if line]
    if not stems:
        raise DatasetError(f"{list_of_images} is empty; write one image file name per line.")
    _refuse_duplicates(stems, list_of_images)
    return stems


def listed_subset(names: Sequence[str], stems: Sequence[str], origin: str) -> list[str]:
    """Choose the names whose stem is one of :func:`read_split_file`, sorted.

    ``origin`` names the list in messages.

    Raises:
        DatasetError: a listed name is not in the data set, or fits more than one image.
    """
    wanted = set(stems)
    chosen = {name: found for name in names if (found := stem(name)) in wanted}
    missing = sorted(wanted - set(chosen.values()))
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(stems)} images that {origin} lists are not in the data "
            f"set: {first_names(missing)}. Correct the list, or name its data set in "
            "DATASETS.TRAIN."
        )
    _refuse_duplicates(list(chosen.values()), "The data set")
    return sorted(chosen)


def stem(name: str) -> str:
    """Remove folder, image extension and Cityscapes' suffixes from a file name.

    >>> stem("train/aachen/aachen_000000_000019_leftImg8bit.png")
    'aachen_000000_000019'
    """
    base = os.path.basename(name)
    root, extension = os.path.splitext(base)
    root = root if extension.lower() in IMAGE_EXTENSIONS else base
    for suffix in (IMAGE_SUFFIX, INSTANCE_SUFFIX):
        root = root.removesuffix(os.path.splitext(suffix)[0])
    return root


def _refuse_duplicates(names: Sequence[str], owner: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DatasetError(
            f"{owner} has {len(twice)} names more than once: {first_names(twice)}. "
            "Images are told apart by their file names: make these unique."
        )


def draw_validation(classes_of: Mapping[str, Set[str]], fraction: float) -> list[str]:
    """Choose the images for validation, sorted, the same on every machine.

    Images are ordered by the BLAKE2b hash of their names. From the rarest class to the most
    frequent, the first image of a class that has none yet is chosen; then the first images of all,
    up to the fraction. Each class keeps an image to train on. To contain each class, the split may
    have up to twice the fraction's images, but not more than half of all.

    Args:
        classes_of: image name -> names of the classes of its instances.
        fraction: in (0, 1); fraction * images is rounded half up, to at least 1.

    Raises:
        ConfigError, DatasetError: the fraction is out of range; no image can be chosen.

    >>> classes_of = {"1.png": {"cat"}, "2.png": {"cat"}, "3.png": {"dog"}, "4.png": {"dog"}}
    >>> draw_validation(classes_of, 0.25)
    ['2.png', '4.png']
    """
    require("S4M.DATA.VAL_FRACTION", fraction, 0 < fraction < 1, "above 0 and below 1")
    ordered = sorted(classes_of, key=name_key)
    left = Counter(name for classes in classes_of.values() for name in classes)
    wanted = _share(fraction, len(ordered))
    most = max(wanted, min(_MOST_FOR_CLASSES * wanted, len(ordered) // 2))
    chosen: set[str] = set()

    def take_first(images: Iterable[str]) -> None:  # that leaves one of each class
        for image in images:
            if image not in chosen and all(left[name] > 1 for name in classes_of[image]):
                chosen.add(image)
                left.subtract(classes_of[image])
                return

    for rare in sorted(left, key=lambda name: (left[name], name)):
        if len(chosen) < most and not any(rare in classes_of[image] for image in chosen):
            take_first(image for image in ordered if rare in classes_of[image])
    for image in ordered:
        if len(chosen) < min(wanted, len(ordered) - 1):
            take_first([image])
    if not any(classes_of[image] for image in chosen):
        some = sum(map(bool, classes_of.values()))
        raise DatasetError(
            f"No validation split can be drawn from {len(ordered)} labeled image(s), {some} with "
            "instances. Label more, give --val, or set S4M.DATA.VAL_FRACTION 0.0."
        )
    return sorted(chosen)
