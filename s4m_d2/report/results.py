"""Evaluation results as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from s4m_d2.files import atomic_write


def write_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested results as JSON; a number that is not finite becomes null.

    Raises:
        OutputError: the system refuses to write.
    """

    def plain(value):
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        if value is None or isinstance(value, int | str):
            return value
        return float(value) if math.isfinite(value) else None

    with atomic_write(path) as file:
        json.dump(plain(results), file, indent=2)
        file.write("\n")


def read_results(path: str) -> dict[str, Any]:
    """What :func:`write_results` wrote."""
    with open(path) as file:
        return json.load(file)
