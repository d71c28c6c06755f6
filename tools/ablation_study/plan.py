"""Which runs are left to train, and how long they will take."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_study.results import STUDENT, TEACHER
from ablation_study.runs import Run, all_runs, with_teachers
from ablation_study.times import Clock, minutes
from ablation_study.training import progress
from s4m_d2.errors import ConfigError

Results = Mapping[str, Mapping[str, Any]]


def chosen_runs(seeds: Sequence[int], only: Sequence[str] = ()) -> list[Run]:
    """The runs that are asked for, in the order of the study.

    Args:
        only: names, or patterns such as ``10pct-seed0-*``; none: all runs.

    Raises:
        ConfigError: a name is none of a run of these seeds.
    """
    runs = all_runs(seeds)
    for pattern in only:
        if not any(fnmatch.fnmatchcase(run.name, pattern) for run in runs):
            raise ConfigError(
                f"--only {pattern}: no run of the seeds {', '.join(map(str, seeds))} is named so. "
                "--list names them."
            )
    if not only:
        return runs
    return [run for run in runs if any(fnmatch.fnmatchcase(run.name, p) for p in only)]


def left_to_train(
    runs: Sequence[Run], results: Results, has_weights: Callable[[Run], bool]
) -> list[Run]:
    """The runs without a result, and before them the teachers that they need.

    A teacher whose result is there but whose weights are gone is trained again.
    """
    missing = [run for run in runs if run.name not in results]
    return [
        run for run in with_teachers(missing) if run.name not in results or not has_weights(run)
    ]


def remaining_seconds(run: Run, folder: Path, clock: Clock) -> float:
    """Estimated time to the end of a run, part of which may be trained.

    Args:
        folder: of all runs.
    """
    return clock.estimate(run) * (1 - progress(folder, run, clock.iterations(run)))


def listing(runs: Sequence[Run], left: Sequence[Run], results: Results, folder: Path,
            clock: Clock) -> str:  # fmt: skip
    """A line a run: done, with its AP and time, or missing, with the time that it will take."""
    lines, total = [], 0.0
    for run in with_teachers(runs):
        if run not in runs and run not in left:
            continue  # a teacher that nobody asked for and nobody needs
        if run not in left:
            result = results[run.name]
            ap = result["models"][TEACHER if run.method.is_teacher else STUDENT]["AP"]
            found = "no AP" if ap is None else f"AP {ap:.1f}"
            lines.append(f"done     {run.name:32} {found}, {minutes(result['seconds'])}")
            continue
        seconds = remaining_seconds(run, folder, clock)
        total += seconds
        share = progress(folder, run, clock.iterations(run))
        begun = f", {share:.0%} trained" if share else ""
        lines.append(f"missing  {run.name:32} about {minutes(seconds)}{begun}")
    done = len(lines) - len(left)
    lines.append(f"{done} done, {len(left)} missing: about {minutes(total)}")
    return "\n".join(lines)
