"""CAM scores of an image, as other programs save them by ``np.save``, and the label map they mean.

A file holds a dictionary in one of two forms:

- ``{class: (H, W) scores, ...}``;
- ``{"keys": (K,) classes, NAME: (K, H, W) scores, ...}``: of several NAMEs that of most pixels.

Classes count from 0 and without background: the class 0 of such a file is the class 1 of a label
map. Where "keys" has an entry more than there are maps, it begins with the background and has the
indices of label maps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from s4m_d2.errors import DatasetError
from s4m_d2.sepl.enhancement import BACKGROUND, VOID

BACKGROUND_SCORE = 0.15  # as in IRN's evaluation of its CAMs
KEYS = "keys"
_NUMBERS = "fiu"  # NumPy's letters for float, signed and unsigned integers
_FORMS = (
    f"expected {{class: (H, W) scores}} or {{'{KEYS}': (K,) classes, NAME: (K, H, W) scores}}, "
    "classes counted from 0 without background"
)


def label_of_scores(content: Any, background_score: float = BACKGROUND_SCORE) -> np.ndarray:
    """The class of the highest score in each pixel; background where none exceeds its score.

    Args:
        content: a dictionary of the forms above. Scores of CAMs are normalized to [0, 1].
        background_score: on the same scale.

    Returns:
        (H, W) uint8, a label map.

    Raises:
        DatasetError: says what is wrong, as part of a sentence.
    """
    try:
        classes, scores = _classes_and_scores(content)
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{_FORMS}; found {_described(content)}") from error
    if not np.isfinite(scores).all():
        raise DatasetError("some scores are not finite")
    if len(classes) and not (classes.min() > BACKGROUND and classes.max() < VOID):
        raise DatasetError(f"classes {classes.tolist()} of a label map; {_FORMS}")
    scores = np.pad(scores, ((1, 0), (0, 0), (0, 0)), constant_values=background_score)
    return np.append(BACKGROUND, classes).astype(np.uint8)[scores.argmax(0)]


def _classes_and_scores(content: Any) -> tuple[np.ndarray, np.ndarray]:
    """(K,) int64 indices of label maps, and (K, H, W) float32.

    Raises:
        TypeError, ValueError: the content is of another form.
    """
    if KEYS not in content:
        classes, scores = np.array(list(content)) + 1, np.stack(list(content.values()))
    else:
        keys = np.asarray(content[KEYS])
        stacks = [value for value in content.values() if np.ndim(value) == 3]
        scores = max(stacks, key=lambda stack: stack.shape[1] * stack.shape[2])
        has_background = len(keys) == len(scores) + 1 and keys[0] == BACKGROUND
        classes = keys[1:] if has_background else keys + 1
    if (
        classes.dtype.kind not in "iu"
        or scores.dtype.kind not in _NUMBERS
        or scores.ndim != 3
        or classes.shape != scores.shape[:1]
    ):
        raise ValueError("no classes and scores")
    return classes.astype(np.int64), scores.astype(np.float32)


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    shapes = [f"{key!r}: {np.shape(value)}" for key, value in list(content.items())[:4]]
    return "{" + ", ".join(shapes) + (", ...}" if len(content) > len(shapes) else "}")
