"""A validation split for annotations that come without one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Set

from s4m_d2.errors import DatasetError, InputError

_KEY_BYTES = 16
_DECIMALS = 6  # removes the floating-point error of fraction * count before rounding
_MOST_FOR_CLASSES = 2  # times the fraction's images, so that each class is in the split


def draw_validation(classes_of: Mapping[str, Set[str]], fraction: float) -> list[str]:
    """Choose the images to evaluate on, the same everywhere and always.

    Each image has a key, the BLAKE2b hash of its name, and smaller keys go first. From the rarest
    class to the most frequent, the first image of a class that has none yet is taken; then the
    first images of all, up to the fraction. A class always keeps an image to train on. For the
    classes' sake the split may have up to twice the fraction's images, but not more than half.

    Args:
        classes_of: the names of the classes that an image has instances of, by the image's name.
        fraction: in (0, 1); fraction * images is rounded half up, to at least 1.

    Returns:
        The chosen names, sorted.

    Raises:
        InputError: the fraction is out of range.
        DatasetError: no image can be spared.

    >>> classes_of = {"1.png": {"cat"}, "2.png": {"cat"}, "3.png": {"dog"}, "4.png": {"dog"}}
    >>> draw_validation(classes_of, 0.25)
    ['2.png', '4.png']
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction must be above 0 and below 1, got {fraction}.")
    ordered = sorted(classes_of, key=_key)
    left = Counter(name for classes in classes_of.values() for name in classes)
    wanted = max(1, math.floor(round(fraction * len(ordered), _DECIMALS) + 0.5))
    most = max(wanted, min(_MOST_FOR_CLASSES * wanted, len(ordered) // 2))
    chosen: set[str] = set()
    for rare in sorted(left, key=lambda name: (left[name], name)):
        if len(chosen) < most and not any(rare in classes_of[image] for image in chosen):
            _take_first((i for i in ordered if rare in classes_of[i]), chosen, classes_of, left)
    for image in ordered:
        if len(chosen) < min(wanted, len(ordered) - 1):
            _take_first([image], chosen, classes_of, left)
    if not any(classes_of[image] for image in chosen):
        raise DatasetError(
            f"No validation split can be drawn from {len(ordered)} labeled image(s): each class "
            "has to keep one to train on. Label more images, give --val (S4M.DATA.VAL), or train "
            "without validation: S4M.DATA.VAL_FRACTION 0.0."
        )
    return sorted(chosen)


def _take_first(
    images: Iterable[str],
    chosen: set[str],
    classes_of: Mapping[str, Set[str]],
    left: Counter[str],
) -> None:
    """Choose the first image that leaves one of each class; count it off in ``left``."""
    for image in images:
        if image not in chosen and all(left[name] > 1 for name in classes_of[image]):
            chosen.add(image)
            left.subtract(classes_of[image])
            return


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=_KEY_BYTES).digest()
