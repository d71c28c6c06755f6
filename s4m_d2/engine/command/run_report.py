"""OUTPUT_DIR/report.html: a run as one page, written when it ends, however it does."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.command.failures import as_text
from s4m_d2.engine.command.run_folder import read_run
from s4m_d2.engine.figures.figure_hook import FOLDER, figure_models
from s4m_d2.engine.figures.figure_set import FigureSet, choose_figures
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.stages import STAGES
from s4m_d2.files import atomic_write, remove_temporaries
from s4m_d2.report import render_page
from s4m_d2.visualization import write_png

logger = logging.getLogger(__name__)

REPORT = "report.html"
DRAWN_AT_END = ("predictions", "pseudo_labels")
IMAGES = 4  # of each


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
    try:
        yield
    except BaseException as error:
        _try_report(folder, error)
        raise
    _try_report(folder)


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
        for name in choose_figures(DRAWN_AT_END, models):
            file = f"{name}_{cfg.SOLVER.MAX_ITER:07d}.png"
            path = os.path.join(cfg.OUTPUT_DIR, FOLDER, file)
            if not os.path.exists(path):
                write_png(figures.draw(name), path)
    except Exception as error:  # whatever it is, it must not cost the end of a training
        logger.warning("The report lacks pictures of the final models: %s", as_text(error))


def _try_report(folder: str, ended_by: BaseException | None = None) -> None:
    if not comm.is_main_process():
        return
    try:
        problem = "" if ended_by is None else _reason(ended_by)
        logger.info("Report: %s", write_report(folder, problem))
    except (Exception, KeyboardInterrupt) as error:  # how the training ended must stay known
        logger.warning("The report of '%s' could not be written: %s", folder, as_text(error))


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "Stopped; --resume continues it."
    return as_text(error)
