"""Means and deviations over seeds, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablation_study.results import STUDENT
from ablation_study.runs import MAIN_PERCENT, Method, Run

Results = Mapping[str, Mapping[str, Any]]  # of finished runs, by name
GAIN, LOSS = "gain", "loss"


@dataclass(frozen=True)
class Summary:
    """A figure of each seed that has it.

    >>> str(Summary({0: 20.0, 1: 22.0, 2: 24.0})), str(Summary({0: 20.0})), str(Summary({}))
    ('22.0 ± 2.0', '20.0', '–')
    """

    by_seed: Mapping[int, float]

    @property
    def count(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.by_seed.values()) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """The sample deviation; None of fewer than two."""
        return statistics.stdev(self.by_seed.values()) if self.count > 1 else None

    def minus(self, other: Summary) -> Summary:
        """The differences in the seeds that both have."""
        seeds = [seed for seed in self.by_seed if seed in other.by_seed]
        return Summary({seed: self.by_seed[seed] - other.by_seed[seed] for seed in seeds})

    def text(self, sign: str = "", digits: int = 1) -> str:
        """Mean ± deviation; "–" where there is nothing.

        Args:
            sign: "+" shows the sign of a positive mean.
        """
        if self.mean is None:
            return "–"
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{deviation}"

    def __str__(self) -> str:
        return self.text()

    @property
    def reading(self) -> str:
        """What a difference says of the two that are compared."""
        if self.mean is None:
            return "missing"
        if self.deviation is None:
            return "one seed: no deviation"
        if abs(self.mean) <= self.deviation:
            return "within the deviation"
        return GAIN if self.mean > 0 else LOSS


def summary(
    results: Results,
    method: Method,
    seeds: Sequence[int],
    *,
    percent: int = MAIN_PERCENT,
    model: str = STUDENT,
    key: str = "AP",
    name: str | None = None,
) -> Summary:
    """A method's figure over the seeds; runs that are missing, or lack it, are left out.

    Args:
        model: a key of a result's ``models``.
        key: ``AP``, ``AP50`` or ``by class``.
        name: of the class, for ``by class``.
    """
    values = {}
    for seed in seeds:
        figures = results.get(Run(method, percent, seed).name, {}).get("models", {}).get(model, {})
        value = figures.get(key)
        if name is not None and value is not None:
            value = value.get(name)
        if value is not None:
            values[seed] = value
    return Summary(values)


def labeling_summary(
    results: Results, method: Method, seeds: Sequence[int], phase: str, key: str
) -> Summary:
    """A scalar on the pseudo-labels over the seeds, at the end of ``burn-in`` or at the ``end``."""
    values = {}
    for seed in seeds:
        result = results.get(Run(method, MAIN_PERCENT, seed).name, {})
        value = result.get("pseudo-labels", {}).get(phase, {}).get(key)
        if value is not None:
            values[seed] = value
    return Summary(values)
