"""How long a run will take: as runs of its kind took, or as measured once on 2 CPU cores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ablation_study.runs import METHODS, Method, Run

# Seconds an iteration of the quickstart's model on 2 cores of an AMD EPYC, 4 + 4 images.
_SUPERVISED = 0.25
_DISTILLING = 0.48
_LABELING = 0.55  # stage 2 without SAM
_REFINING = 0.72
_AROUND = 30.0  # seconds to start, check and evaluate


def usual_seconds(method: Method, iterations: int) -> float:
    """What a run takes on the machine of the figures above."""
    if method.has_student:
        pace = _REFINING if method.refines else _LABELING
    else:
        pace = _DISTILLING if method.distills else _SUPERVISED
    return _AROUND + pace * iterations


class Clock:
    """Estimates from finished runs.

    Args:
        iterations: of the stage-1 teachers, and of all other runs.
        results: of finished runs, by name.
    """

    def __init__(
        self, iterations: tuple[int, int], results: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._iterations = iterations
        self._seconds: dict[str, list[float]] = {}
        for result in results.values():
            self._seconds.setdefault(result["method"], []).append(result["seconds"])

    def iterations(self, run: Run) -> int:
        return self._iterations[0 if run.method.is_teacher else 1]

    def estimate(self, run: Run) -> float:
        """Seconds from its first iteration to its results."""
        same = self._seconds.get(run.method.slug)
        if same:
            return statistics.mean(same)
        usual = usual_seconds(run.method, self.iterations(run))
        ratios = [
            statistics.mean(seconds) / usual_seconds(METHODS[slug], self._of(METHODS[slug]))
            for slug, seconds in self._seconds.items()
        ]
        return usual * (statistics.median(ratios) if ratios else 1.0)

    def _of(self, method: Method) -> int:
        return self._iterations[0 if method.is_teacher else 1]


def minutes(seconds: float) -> str:
    """
    >>> minutes(200)
    '3.3 min'
    >>> minutes(9000)
    '2.5 h'
    """
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
