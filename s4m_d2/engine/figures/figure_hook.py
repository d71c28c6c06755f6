"""Figures while training goes on: into OUTPUT_DIR/figures and TensorBoard."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from s4m_d2.engine.figures.figure_set import (
    WITHOUT_MODEL,
    FigureModels,
    FigureSet,
    choose_figures,
)
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.errors import S4MError
from s4m_d2.visualization import write_png

logger = logging.getLogger(__name__)

FOLDER = "figures"


class FiguresHook(HookBase):
    """Draws the same figures of the same images every ``period`` iterations.

    Each is written as ``folder/NAME_ITERATION.png`` and given to TensorBoard as figures/NAME.
    Figures that do not depend on the models are drawn once. One that cannot be drawn or written is
    warned of, and training goes on: without it from then on, or, where the disk is full, without
    that file.

    Training is the same with and without this hook (see :class:`FigureSet`). Only the main process
    may have it; the others wait for it in the next iteration.

    Args:
        figures: draws.
        names: of FIGURES.
        period: iterations, 1 or more.
        folder: of the files.
    """

    def __init__(self, figures: FigureSet, names: Sequence[str], period: int, folder: str) -> None:
        self.figures = figures
        self.names = list(names)
        self.period = period
        self.folder = folder

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        if finished % self.period:
            return
        for name in list(self.names):
            try:
                picture = self.figures.draw(name)
            except (S4MError, torch.cuda.OutOfMemoryError) as error:
                logger.warning("The figure '%s' is left out from here on: %s", name, error)
                self.names.remove(name)
                continue
            self._show(name, picture, finished)
            if name in WITHOUT_MODEL:
                self.names.remove(name)

    def _show(self, name: str, picture: np.ndarray, finished: int) -> None:
        get_event_storage().put_image(f"{FOLDER}/{name}", picture.transpose(2, 0, 1))
        try:
            write_png(picture, os.path.join(self.folder, f"{name}_{finished:07d}.png"))
        except OSError as error:  # OutputError among them
            logger.warning("The figure '%s' is not written: %s", name, error)


def figure_hooks(
    cfg: CfgNode, model: nn.Module, labeling: PseudoLabeling | None = None
) -> list[FiguresHook]:
    """The hook that S4M.FIGURES asks for, if any.

    Args:
        cfg: config of a stage.
        model: that is trained, without wrappers.
        labeling: of stage 2.
    """
    settings = cfg.S4M.FIGURES
    if not settings.PERIOD or not comm.is_main_process():
        return []
    models = figure_models(model, labeling)
    names = choose_figures(settings.WHAT, models)
    names = [name for name in names if name != "arp" or cfg.S4M.ARP.ENABLED]
    figures = FigureSet(cfg, models, settings.IMAGES)
    return [FiguresHook(figures, names, settings.PERIOD, os.path.join(cfg.OUTPUT_DIR, FOLDER))]


def figure_models(model: nn.Module, labeling: PseudoLabeling | None = None) -> FigureModels:
    """What the figures of a stage are drawn of; the arguments are those of :func:`figure_hooks`."""
    if labeling is None:
        backend = getattr(getattr(model, "distillation", None), "backend", None)
        return FigureModels({"teacher": model}, backend=backend)
    backend = getattr(labeling.refiner, "backend", None)
    teacher = labeling.teacher
    return FigureModels({"student": model, "teacher": teacher.model}, teacher, backend)
