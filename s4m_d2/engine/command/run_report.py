"""OUTPUT_DIR/report.html: a run as one page, written when it ends, however it does."""

from __future__ import annotations

import datetime
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT
from s4m_d2.engine.command.failures import as_text
from s4m_d2.engine.command.run_facts import FACTS
from s4m_d2.engine.figures.figure_set import FOLDER, FigureSet, figure_models
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.stages import ITERATIONS, METRICS, RESULTS, STAGES
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write, remove_temporaries
from s4m_d2.report import Run, Settings, Stage, pictures_of, read_curves, render_page
from s4m_d2.visualization import write_png

logger = logging.getLogger(__name__)

REPORT = "report.html"
CONFIG = "config.yaml"
OVERVIEW = "overview.png"  # of the quickstart
DRAWN_AT_END = ("predictions", "pseudo_labels")
IMAGES = 4  # of each
MOST_TEXT = 1 << 20  # characters; of a larger file the rest is not read


def write_report(folder: str, problem: str = "") -> str:
    """Write the report of a run from what lies in its output folder; returns the page's path.

    Args:
        problem: why the run ended before its end, if it did.

    Raises:
        DatasetError: the folder holds nothing of a run.
        OutputError: the page cannot be written.
    """
    page = render_page(read_run(folder, problem))
    path = os.path.join(folder, REPORT)
    with atomic_write(path, "wb") as file:
        file.write(page.encode("utf-8", "replace"))
    return path


@contextmanager
def reported(folder: str) -> Iterator[None]:
    """Around a training: its report is written afterwards, also where it fails or is stopped.

    By the main process alone. A report that cannot be written is a warning. What a killed run left
    half-written goes before.
    """
    if comm.is_main_process():
        remove_temporaries(folder)
        for stage in STAGES:
            for below, _, _ in os.walk(os.path.join(folder, stage)):
                remove_temporaries(below)
    problem = ""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        problem = "Stopped; --resume continues it." if stopped else as_text(error)
        raise
    finally:
        if comm.is_main_process():
            _try_report(folder, problem)


def _try_report(folder: str, problem: str) -> None:
    try:
        logger.info("Report: %s", write_report(folder, problem))
    except (Exception, KeyboardInterrupt) as error:  # how the training ended must stay known
        logger.warning("The report of '%s' could not be written: %s", folder, as_text(error))


def draw_final(cfg: CfgNode, model: nn.Module, labeling: PseudoLabeling | None = None) -> None:
    """Draw validation images with a stage's final models, where S4M.FIGURES has not done so.

    Into the stage's figures, in the main process alone. The images have the size that evaluation
    gives them, and are drawn one by one: it takes no more memory. What fails is a warning.

    Args:
        cfg: config of the stage.
        model: that was trained, without wrappers.
        labeling: of stage 2.
    """
    if not comm.is_main_process() or not cfg.DATASETS.TEST:
        return
    try:
        models = figure_models(model, labeling)
        figures = FigureSet(cfg, models, IMAGES, resized=True)
        for name in models.choose(DRAWN_AT_END):
            file = f"{name}_{cfg.SOLVER.MAX_ITER:07d}.png"
            path = os.path.join(cfg.OUTPUT_DIR, FOLDER, file)
            if not os.path.exists(path):
                write_png(figures.draw(name), path)
    except Exception as error:  # whatever it is, it must not cost the end of a training
        logger.warning("The report lacks pictures of the final models: %s", as_text(error))


def read_run(folder: str, problem: str = "") -> Run:
    """What a run has left in its output folder.

    Raises:
        DatasetError: that is nothing of a run.
    """
    config = _text(os.path.join(folder, CONFIG))
    try:
        settings = Settings(yaml.safe_load(config))
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        settings = Settings()  # PyYAML checks little of what stands under a tag
    except RecursionError:
        settings = Settings()
    present = [name for name in STAGES if os.path.isdir(os.path.join(folder, name))]
    if not config and not present:
        raise DatasetError(
            f"'{folder}' holds no run: expected {CONFIG} or the folders {' and '.join(STAGES)}. "
            "Give the OUTPUT_DIR of a training."
        )
    stages = [_stage(os.path.join(folder, name), name, settings) for name in present]
    facts, _ = _json(os.path.join(folder, FACTS))
    return Run(
        name=os.path.basename(os.path.abspath(folder)),
        stages=stages,
        settings=settings,
        config=config,
        facts=[(name, str(text)) for name, text in facts.items()],
        pictures=pictures_of(
            [(stage.title, os.path.join(folder, stage.name, FOLDER)) for stage in reversed(stages)],
            [("What happens to an image in stage 2", os.path.join(folder, OVERVIEW))],
        ),
        problem=problem,
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _stage(folder: str, name: str, settings: Settings) -> Stage:
    own = settings.count("S4M.TEACHER.MAX_ITER") if name == "teacher" else 0
    results, problem = _json(os.path.join(folder, RESULTS))
    finished = os.path.isfile(os.path.join(folder, FINAL_CHECKPOINT))
    done = Settings(results).count(ITERATIONS) if finished else 0
    return Stage(
        name=name,
        curves=read_curves(os.path.join(folder, METRICS)),
        results=results,
        iterations=done or own or settings.count("SOLVER.MAX_ITER"),
        burn_in=settings.count("S4M.BURN_IN") if name == "student" else 0,
        finished=finished,
        problem=problem,
    )


def _json(path: str) -> tuple[dict[str, Any], str]:
    """A file's object, empty if there is none, and what is wrong with it, "" if nothing is."""
    if not os.path.exists(path):
        return {}, ""
    try:
        content = json.loads(_text(path))
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content, ""
    return {}, f"{os.path.basename(path)} of this stage cannot be read."


def _text(path: str) -> str:
    """A file's text, "" if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(MOST_TEXT)
    except OSError:
        return ""
