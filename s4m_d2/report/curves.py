"""The curves of a run's metrics.json, thinned to what a page can show.

The file has a JSON object a line, each with an "iteration"; it may end in a torn line. Memory does
not grow with the length of the file but for eight bytes a line.
"""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 240  # of a curve
LARGEST = 1e300  # beyond it, a value is as good as infinite
_ITERATION = re.compile(rb'"iteration":\s*(\d{1,15})\s*[,}]')
_NONE = -1

Derive = Callable[[Mapping[str, float]], Mapping[str, float]]


@dataclass
class Point:
    """What a curve shows of a few neighboring records.

    Attributes:
        iteration: of the first and of the last record.
        low, mean, high: of the finite values; NaN if there are none.
        bad: how many values are not finite.
    """

    iteration: tuple[int, int]
    low: float = math.nan
    mean: float = math.nan
    high: float = math.nan
    bad: int = 0
    _count: int = 0

    def add(self, iteration: int, value: float) -> None:
        self.iteration = min(self.iteration[0], iteration), max(self.iteration[1], iteration)
        if not abs(value) <= LARGEST:
            self.bad += 1
            return
        self._count += 1
        first = self._count == 1
        self.mean = value if first else self.mean + (value - self.mean) / self._count
        self.low = value if first else min(self.low, value)
        self.high = value if first else max(self.high, value)

    @property
    def middle(self) -> float:
        """Where the point stands on the axis of iterations."""
        return (self.iteration[0] + self.iteration[1]) / 2


@dataclass
class Curve:
    """Points by iteration, ascending; ``last`` is the (iteration, value) of the last record."""

    points: list[Point] = field(default_factory=list)
    last: tuple[int, float] = (0, math.nan)


@dataclass
class Curves:
    """All curves of a file.

    Attributes:
        by_name: curves by the name of what was derived from a record.
        records: lines that are one.
        unreadable: lines that are none.
        last_iteration: None: there is no record.
    """

    by_name: dict[str, Curve] = field(default_factory=dict)
    records: int = 0
    unreadable: int = 0
    last_iteration: int | None = None

    def mean(self, name: str) -> float:
        """The mean of a curve's points, NaN if there is none."""
        values = [p.mean for p in self.get(name).points if math.isfinite(p.mean)]
        return sum(values) / len(values) if values else math.nan

    def get(self, name: str) -> Curve:
        return self.by_name.get(name, Curve())


def read_curves(path: str | os.PathLike[str], derive: Derive, most: int = MOST_POINTS) -> Curves:
    """The curves of a metrics.json, which may be missing, empty, torn, or being written.

    Args:
        derive: from a record's numbers to the values of curves.
        most: points of a curve at most. Records of neighboring iterations share a point.
    """
    curves = Curves()
    iterations = array("q", (_iteration(line) for line in _lines(path)))
    count = len(iterations) - iterations.count(_NONE)
    if not count:
        return curves
    first = min(i for i in iterations if i != _NONE)
    width = 1 if count <= most else -(-(max(iterations) - first + 1) // most)
    bins: dict[str, dict[int, Point]] = {}
    lasts: dict[str, tuple[int, float]] = {}
    for iteration, record in _records(path, iterations, curves):
        curves.records += 1
        curves.last_iteration = max(iteration, curves.last_iteration or 0)
        for name, value in derive(record).items():
            points = bins.setdefault(name, {})
            point = points.setdefault((iteration - first) // width, Point((iteration, iteration)))
            point.add(iteration, value)
            if iteration >= lasts.get(name, (_NONE, 0.0))[0]:
                lasts[name] = iteration, value
    for name, points in bins.items():
        curves.by_name[name] = Curve([points[place] for place in sorted(points)], lasts[name])
    return curves


def _iteration(line: bytes) -> int:
    """The iteration of a line, _NONE for one that has none or is torn."""
    match = _ITERATION.search(line)
    return int(match[1]) if match and line.rstrip().endswith(b"}") else _NONE


def _records(
    path: str | os.PathLike[str], iterations: array, curves: Curves
) -> Iterator[tuple[int, dict[str, float]]]:
    """Iteration and numbers of each record; counts the lines that are none in ``curves``."""
    for iteration, line in zip(iterations, _lines(path), strict=False):
        record = None if iteration == _NONE else _parsed(line)
        curves.unreadable += record is None and bool(line.strip())
        if record:
            yield iteration, record


def _lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except OSError:
        return


def _parsed(line: bytes) -> dict[str, float] | None:
    """The numbers of a record, None for what is none. A null is a number that is not finite."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
        return None
    return {key: _number(value) for key, value in record.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float | None) -> float:
    try:
        return math.nan if value is None else float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf
