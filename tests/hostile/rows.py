"""What the tables share: one scene with a known instance, and how a row is judged."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import pytest

from s4m_d2.data import ARPDatasetMapper, LabeledDatasetMapper
from s4m_d2.errors import S4MError

HEIGHT, WIDTH = 24, 40
WINDOW = (slice(4, 16), slice(6, 30))  # rows and columns of the only instance
BOX_POLYGON = [6, 4, 30, 4, 30, 16, 6, 16]


@contextlib.contextmanager
def one_error(kind: type[S4MError], *expected: str) -> Iterator[None]:
    """The block ends in one error of ``kind``, whose message has every regular expression of
    ``expected`` (the first names the input)."""
    with pytest.raises(S4MError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, message
    for pattern in expected:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    assert "Traceback" not in message and "\n  File " not in message


def mask() -> np.ndarray:
    """(H, W) bool."""
    ground = np.zeros((HEIGHT, WIDTH), dtype=bool)
    ground[WINDOW] = True
    return ground


def scene() -> np.ndarray:
    """(H, W, 3) uint8: a red instance on blue."""
    image = np.full((HEIGHT, WIDTH, 3), (20, 40, 200), dtype=np.uint8)
    image[WINDOW] = (220, 30, 30)
    return image


def labeled(num_classes: int = 8) -> LabeledDatasetMapper:
    """Without augmentation."""
    return LabeledDatasetMapper(
        geometry=[], color=None, image_format="RGB", num_classes=num_classes
    )


def unlabeled(geometry=()) -> ARPDatasetMapper:
    return ARPDatasetMapper(geometry=geometry, color=None, image_format="RGB")
