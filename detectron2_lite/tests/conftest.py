"""The values that Detectron2 gave, for tests that run on either engine."""

import json
import os
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch

FILE = Path(__file__).parent / "data" / "detectron2.json"
RECORD = "DETECTRON2_RECORD"  # an environment variable; data/README.md says what it does


def plain(value):
    """Tensors, arrays and tuples as lists, numpy's numbers as Python's: what JSON holds.

    Floats keep nine digits.
    """
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, int):
        return value if isinstance(value, bool) else int(value)  # an IntEnum has a number
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def assert_same(got, expected, where, **tolerance):
    assert type(got) is type(expected), f"{where}: {got!r}, Detectron2 gives {expected!r}"
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), f"{where}: {list(got)}, Detectron2 {list(expected)}"
        for key in expected:
            assert_same(got[key], expected[key], f"{where}.{key}", **tolerance)
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{where}: {got}, Detectron2 gives {expected}"
        for i, pair in enumerate(zip(got, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]", **tolerance)
    else:
        if isinstance(expected, float) or "abs" in tolerance and isinstance(expected, int):
            expected = pytest.approx(expected, nan_ok=True, **tolerance)
        assert got == expected, where


class Reference:
    """Called as (name, value, abs=, rel=): assert that ``value`` is what Detectron2 gave.

    Numbers that are no integers, or all numbers if ``abs`` is given, are compared up to the
    tolerance (pytest.approx's, 1e-6 relative).
    """

    def __init__(self):
        self.values = json.loads(FILE.read_text()) if FILE.exists() else {}
        self.recorded = {} if os.environ.get(RECORD) else None
        if self.recorded is not None:
            assert "lite" not in detectron2.__version__, "references come from Detectron2 itself"

    def __call__(self, name, value, **tolerance):
        if self.recorded is None:
            assert_same(plain(value), self.values[name], name, **tolerance)
        else:
            assert name not in self.recorded, f"two values are called {name}"
            self.recorded[name] = plain(value)

    def write(self):
        values = sorted({**self.values, **self.recorded}.items())
        lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in values]
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.fixture(scope="session")
def reference():
    reference = Reference()
    yield reference
    if reference.recorded is not None:
        reference.write()
