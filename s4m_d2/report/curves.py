"""Curves of metrics.json, thinned for a page, and results of evaluations.

metrics.json has a JSON object per line, each with an "iteration"; its last line may be truncated.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s4m_d2.files import atomic_write

MOST_POINTS = 240  # of a curve
LARGEST = 1e38  # the range of float32; larger values count as infinite
LABELED, UNLABELED = "labeled", "unlabeled"
MEASURES = ("class_accuracy", "sq", "precision", "recall", "pq")  # of pseudo-label quality
_UNSUP = "unsup/"
_LAYER = re.compile(r"_\d+$")
_KEPT = re.compile(
    r"total_loss|lr|time|data_time|(pseudo_labels|refinement|data|train)/.+|(.+/)?segm/AP"
    rf"|pseudo_label_quality/(before|after)/({'|'.join(MEASURES)})"
)


def finite(value: object) -> float | None:
    """Convert to float; None: not a number, or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else None


@dataclass(frozen=True)
class Curve:
    """Points by iteration, each of one record or of several consecutive ones.

    Attributes:
        iterations: (P,) the middle of the point's records.
        low, mean, high: (P,) of the finite values; NaN if there are none.
        bad: (P,) number of values that are not finite.
        last: value of the last record.
    """

    iterations: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    bad: np.ndarray
    last: float


_NONE = np.zeros(0)
EMPTY = Curve(_NONE, _NONE, _NONE, _NONE, _NONE, math.nan)


@dataclass
class Curves:
    """All curves of a file.

    Attributes:
        by_name: name by :func:`curve_names` → curve.
        records: number of valid lines.
        unreadable: number of invalid lines.
        last_iteration: None: no records.
    """

    by_name: dict[str, Curve] = field(default_factory=dict)
    records: int = 0
    unreadable: int = 0
    last_iteration: int | None = None

    def get(self, name: str) -> Curve:
        return self.by_name.get(name, EMPTY)

    def mean(self, name: str) -> float:
        """Mean of a curve's points; NaN if there are none."""
        values = self.get(name).mean
        values = values[np.isfinite(values)]
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
    found: dict[str, array] = {}  # by turns iterations and values
    first, last = 1 << 50, -1
    for line in _lines(path):
        record = _parsed(line)
        if record is None:
            curves.unreadable += bool(line.strip())
            continue
        iteration, values = record
        curves.records += 1
        first, last = min(iteration, first), max(iteration, last)
        for name, value in values.items():
            found.setdefault(name, array("d")).extend((iteration, value))
    if curves.records:
        curves.last_iteration = last
    width = 1 if curves.records <= most else -(-(last - first + 1) // most)
    for name, pairs in found.items():
        x, y = np.array(pairs).reshape(-1, 2).T
        curves.by_name[name] = _thinned(x, y, first, width)
    return curves


def _thinned(iterations: np.ndarray, values: np.ndarray, first: int, width: int) -> Curve:
    """Thin a curve: its points cover ``width`` iterations each, from ``first`` on."""
    order = np.argsort(iterations, kind="stable")
    x, y = iterations[order], values[order]
    starts = np.flatnonzero(np.diff((x - first) // width, prepend=-1))
    ends = np.append(starts[1:], len(x)) - 1
    good = np.abs(y) <= LARGEST
    count = np.add.reduceat(good.astype(float), starts)
    low = np.minimum.reduceat(np.where(good, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(good, y, -np.inf), starts)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.where(good, y, 0.0), starts) / count
    low, high = np.where(count, low, np.nan), np.where(count, high, np.nan)
    return Curve(
        (x[starts] + x[ends]) / 2, low, mean, high, ends - starts + 1 - count, float(y[-1])
    )


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError:
        return


def _parsed(line: bytes) -> tuple[int, dict[str, float]] | None:
    """A record's iteration, and its value for each curve; None: not a record.

    null stands for a number that is not finite.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    iteration = record.get("iteration") if isinstance(record, dict) else None
    if not isinstance(iteration, int) or not 0 <= iteration < 1 << 50:
        return None
    values: dict[str, float] = {}
    for key, value in record.items():
        known = finite(value)
        if known is None:
            if value is not None and type(value) not in (int, float):
                continue
            known = math.nan
        for name in curve_names(key):
            values[name] = values.get(name, 0.0) + known
    return iteration, values


def write_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested results as JSON; numbers that are not finite become null.

    Raises:
        OutputError: the file cannot be written.
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
    """Read a file of :func:`write_results`."""
    with open(path) as file:
        return json.load(file)
