"""What a finished run leaves: one JSON file, made from what its training wrote."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation_study.runs import Run
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write

# Models of a run. "student" is also what a supervised run trains: the model on the same schedule.
TEACHER, STUDENT, EMA = "stage-1 teacher", "student", "EMA teacher"
_LABELING = ("pseudo_label", "refinement/")  # how the scalars on pseudo-labels begin
_LOSSES = ("loss_", "unsup/loss_", "total_loss")
END_SHARE = 0.1  # of the logged iterations, whose mean is called a value "at the end"


def read_results(folder: Path, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """The results there are, by the name of the run.

    Raises:
        DatasetError: a file is damaged, or holds something else.
    """
    found = {}
    for run in runs:
        path = folder / f"{run.name}.json"
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            _check(result, run)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise DatasetError(
                f"'{path}' is no result of the run {run.name}, or damaged: {error!r}. Remove it: "
                "it is made again, from what the run has trained if that is still there."
            ) from error
        found[run.name] = result
    return found


def _check(result: Mapping[str, Any], run: Run) -> None:
    if result["name"] != run.name:
        raise ValueError(f"the name is {result['name']!r}")
    for name, figures in result["models"].items():
        if not (figures["AP"] is None or math.isfinite(figures["AP"])):
            raise ValueError(f"AP of the {name} is {figures['AP']!r}")
    float(result["seconds"])


def write_result(result: Mapping[str, Any], folder: Path) -> None:
    """Write a complete result, or nothing."""
    with atomic_write(folder / f"{result['name']}.json") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


def collect(
    run: Run,
    runs: Path,
    teacher: Mapping[str, Any] | None,
    attempts: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The result of a run whose training has ended.

    Args:
        runs: the folder of all runs.
        teacher: the result of its stage 1, where that is another run.
        attempts: the times that it was started, each with ``seconds`` and ``code``.
        about: what else to say of how it was made.

    Raises:
        OSError, ValueError, LookupError: the training has not written what it should have.
    """
    folder = runs / run.name / run.stage
    final = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    models = {TEACHER if run.method.is_teacher else STUDENT: _figures(final)}
    if "teacher" in final:
        models[EMA] = _figures(final["teacher"])
    if teacher is not None:
        models = {TEACHER: teacher["models"][TEACHER], **models}
    times = [line["time"] for line in lines if "time" in line]
    return {
        "name": run.name,
        "method": run.method.slug,
        "percent": run.percent,
        "seed": run.seed,
        "models": models,
        "pseudo-labels": labeling(lines),
        "losses": _at_end(lines, _LOSSES),
        "bad steps": max((line.get("train/bad_steps", 0) for line in lines), default=0),
        "iterations": max((x["iteration"] + 1 for x in lines if "total_loss" in x), default=0),
        "seconds": sum(attempt["seconds"] for attempt in attempts),
        "seconds an iteration": statistics.median(times) if times else None,
        "attempts": len(attempts),
        "settings": run.overrides(Path()),
        **about,
        "code": list(dict.fromkeys(attempt["code"] for attempt in attempts)),
    }


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """AP, AP50 and AP by class, in percent."""
    segm = results["segm"]
    return {
        "AP": segm["AP"],
        "AP50": segm["AP50"],
        "by class": {k.removeprefix("AP-"): v for k, v in segm.items() if k.startswith("AP-")},
    }


def labeling(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the pseudo-labels were: at the end of burn-in, at the end of the run, and throughout.

    Returns:
        ``burn-in`` and ``end``: means over the last tenth of the logged iterations of each phase;
        ``history``: iteration → values, of all logged ones.
    """
    of_labels = [line for line in lines if _chosen(line, _LABELING)]
    frozen = [line for line in of_labels if line.get("teacher/phase") == 0]
    return {
        "burn-in": _at_end(frozen, _LABELING),
        "end": _at_end(of_labels, _LABELING),
        "history": {str(line["iteration"]): _chosen(line, _LABELING) for line in of_labels},
    }


def _chosen(line: Mapping[str, Any], starts: tuple[str, ...]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith(starts)}


def _at_end(lines: Sequence[Mapping[str, Any]], starts: tuple[str, ...]) -> dict[str, float]:
    chosen = [values for values in (_chosen(line, starts) for line in lines) if values]
    last = chosen[-max(1, round(END_SHARE * len(chosen))) :] if chosen else []
    keys = dict.fromkeys(key for values in last for key in values)
    return {key: statistics.mean(v[key] for v in last if key in v) for key in keys}
