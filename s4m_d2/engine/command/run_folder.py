"""What a run has left in its output folder, as a page shows it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from typing import Any

import yaml

from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT
from s4m_d2.engine.command.run_log import log_facts
from s4m_d2.engine.figures.figure_hook import FOLDER
from s4m_d2.engine.stages import ITERATIONS, METRICS, RESULTS, STAGES
from s4m_d2.errors import DatasetError
from s4m_d2.report import Run, Settings, Stage, pictures_of, read_curves
from s4m_d2.report.charts import derive

CONFIG, LOG = "config.yaml", "log.txt"
OVERVIEW = "overview.png"  # of the quickstart
MOST_TEXT = 1 << 20  # characters; of a larger file the rest is not read
# PyYAML checks little of what stands under a tag.
_YAML_ERRORS = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def read_run(folder: str, problem: str = "") -> Run:
    """What a run has left in its output folder.

    Raises:
        DatasetError: that is nothing of a run.
    """
    config = _text(os.path.join(folder, CONFIG))
    settings = Settings(_settings(config))
    stages = [
        _stage(os.path.join(folder, name), name, settings)
        for name in STAGES
        if os.path.isdir(os.path.join(folder, name))
    ]
    if not config and not stages:
        raise DatasetError(
            f"'{folder}' holds no run: expected {CONFIG} or the folders {' and '.join(STAGES)}. "
            "Give the OUTPUT_DIR of a training."
        )
    return Run(
        name=os.path.basename(os.path.abspath(folder)),
        stages=stages,
        settings=settings,
        config=config,
        facts=log_facts(os.path.join(folder, LOG)),
        pictures=pictures_of(
            [(stage.title, os.path.join(folder, stage.name, FOLDER)) for stage in reversed(stages)],
            [("What happens to an image in stage 2", os.path.join(folder, OVERVIEW))],
        ),
        problem=problem,
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _stage(folder: str, name: str, settings: Settings) -> Stage:
    own = settings.number("S4M.TEACHER.MAX_ITER") if name == "teacher" else 0
    results, problem = _results(os.path.join(folder, RESULTS))
    finished = os.path.isfile(os.path.join(folder, FINAL_CHECKPOINT))
    done = Settings(results).number(ITERATIONS) if finished else 0
    return Stage(
        name=name,
        curves=read_curves(os.path.join(folder, METRICS), derive),
        results=results,
        iterations=max(0, int(done or own or settings.number("SOLVER.MAX_ITER"))),
        burn_in=int(settings.number("S4M.BURN_IN")) if name == "student" else None,
        finished=finished,
        problems=[problem] if problem else [],
    )


def _results(path: str) -> tuple[Mapping[str, Any], str]:
    """Evaluation results, and what is wrong with their file, "" if nothing is."""
    if not os.path.exists(path):
        return {}, ""
    try:
        results = json.loads(_text(path))
    except (ValueError, RecursionError):
        results = None
    if isinstance(results, dict):
        return results, ""
    return {}, f"{RESULTS} of this stage cannot be read."


def _settings(config: str) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(config)
    except (*_YAML_ERRORS, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _text(path: str) -> str:
    """A file's text, "" if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MOST_TEXT)
    except OSError:
        return ""
