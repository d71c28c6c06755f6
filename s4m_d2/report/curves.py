"""Curves of metrics.json, thinned for a page, and results of evaluations.

metrics.json has a JSON object per line, each with an "iteration"; its last line may be truncated.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from s4m_d2.files import atomic_write

MOST_POINTS = 240  # of a curve
LABELED, UNLABELED = "labeled", "unlabeled"
MEASURES = ("class_accuracy", "sq", "precision", "recall", "pq")  # of pseudo-label quality
_UNSUP = "unsup/"
_LAYER = re.compile(r"_\d+$")
_KEPT = re.compile(
    r"total_loss|lr|time|data_time|(pseudo_labels|refinement|data|train)/.+|(.+/)?segm/AP"
    rf"|pseudo_label_quality/(before|after)/({'|'.join(MEASURES)})"
)


def finite(value: object) -> float | None:
    """Convert to float; None: not a number, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Curve:
    """Points by iteration, each of one record or of several consecutive ones; P points."""

    iterations: np.ndarray  #: (P,) the middle of the point's records
    low: np.ndarray  #: (P,) least of the point's finite values; without any there is no point
    mean: np.ndarray  #: (P,) of them
    high: np.ndarray  #: (P,) greatest of them
    last: float  #: value of the last record


_NONE = np.zeros(0)
EMPTY = Curve(_NONE, _NONE, _NONE, _NONE, math.nan)


@dataclass
class Curves:
    """All curves of a file."""

    #: Name by :func:`curve_names` → curve.
    by_name: dict[str, Curve] = field(default_factory=dict)
    records: int = 0  #: number of valid lines
    iterations: int = 0  #: up to the last record

    def get(self, name: str) -> Curve:
        return self.by_name.get(name, EMPTY)

    def mean(self, name: str) -> float:
        """Mean of a curve's points; NaN if there are none."""
        values = self.get(name).mean
        return float(values.mean()) if len(values) else math.nan


@functools.lru_cache(1 << 14)
def curve_names(key: str) -> tuple[str, ...]:
    """Names of the curves to which a value of metrics.json is added.

    Losses of all layers are summed by kind, as "labeled:loss_ce" and "unlabeled:loss_ce", and over
    all kinds, as "labeled" and "unlabeled". Other values keep their names, or are ignored.
    """
    name = key.removeprefix(_UNSUP)
    if name.startswith("loss"):
        part = LABELED if name == key else UNLABELED
        return part, f"{part}:{_LAYER.sub('', name)}"
    return (key,) if _KEPT.fullmatch(key) else ()


def read_curves(path: str | os.PathLike[str], most: int = MOST_POINTS) -> Curves:
    """The curves of a metrics.json, which may be missing, empty, torn, or being written.

    Args:
        most: points of a curve at most. Records of neighboring iterations share a point.
    """
    curves = Curves()
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in Path(path).read_bytes().splitlines() if os.path.exists(path) else ():
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (ValueError, LookupError, TypeError):
            continue
        values: dict[str, float] = {}
        for key, value in record.items():
            for name in curve_names(key):
                known = finite(value)
                values[name] = values.get(name, 0.0) + (math.nan if known is None else known)
        for name, value in values.items():
            found[name].append((iteration, value))
        curves.records += 1
        curves.iterations = max(curves.iterations, iteration + 1)
    width = 1 if curves.records <= most else -(-curves.iterations // most)
    for name, pairs in found.items():
        curves.by_name[name] = _thinned(np.array(pairs), width)
    return curves


def _thinned(pairs: np.ndarray, width: int) -> Curve:
    """The curve of (iteration, value) pairs, whose points cover ``width`` iterations each."""
    last = pairs[-1, 1]
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    pairs = pairs[np.isfinite(pairs[:, 1])]
    starts = np.flatnonzero(np.diff(pairs[:, 0] // width, prepend=-1))
    if not len(starts):
        return EMPTY
    parts = np.split(pairs, starts[1:])
    middles = np.array([(part[0, 0] + part[-1, 0]) / 2 for part in parts])
    values = [part[:, 1] for part in parts]
    low, mean, high = (np.array([of(v) for v in values]) for of in (np.min, np.mean, np.max))
    return Curve(middles, low, mean, high, float(last))


def write_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested results as JSON; numbers that are not finite become null."""

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


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of :func:`write_results`."""
    with open(path) as file:
        return json.load(file)


def stored_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The same; {}: the file is missing or damaged."""
    try:
        return dict(read_results(path))
    except (OSError, TypeError, ValueError):
        return {}
