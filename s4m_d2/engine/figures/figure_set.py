"""The figures that a config can have, of the same images each time, and the hook of training."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from s4m_d2.data import StrongView
from s4m_d2.engine.figures.figure_samples import (
    labeled_samples,
    unlabeled_samples,
    validation_samples,
)
from s4m_d2.engine.figures.figures import (
    SCORE_SHOWN,
    arp_panels,
    labeled_panels,
    prediction_panels,
    pseudo_label_panels,
    to_rgb,
    view_panels,
)
from s4m_d2.engine.figures.predictor import Predictor, class_names
from s4m_d2.engine.figures.similarity_figure import point_of, similarity_panels
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.rng import undisturbed_generators
from s4m_d2.errors import S4MError
from s4m_d2.losses.structural_distillation import StructuralDistillation
from s4m_d2.sam import SamBackend
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.structures import sample_generators
from s4m_d2.visualization import Panels, write_png

logger = logging.getLogger(__name__)

FOLDER = "figures"  # in the stage's
FIGURES = ("labeled", "views", "pseudo_labels", "arp", "similarity", "predictions")
WITHOUT_MODEL = ("labeled", "views")  # always the same
OF_TEACHER = ("pseudo_labels", "arp")
DRAWS = 3  # of augmentations, for each labeled image
PAIR_ALL = 0.5  # pairs an image: every image of a figure exchanges instances


@dataclass(frozen=True)
class FigureModels:
    """What figures are drawn of; models are put into eval mode while they are used, no longer.

    Attributes:
        by_name: name, as figures show it → model.
        teacher: labels images; None: no figures of pseudo-labels and ARP.
        backend: SAM; None: no figures of similarities.
    """

    by_name: Mapping[str, nn.Module]
    teacher: EMATeacher | None = None
    backend: SamBackend | None = None

    def choose(self, wanted: Sequence[str] = FIGURES) -> list[str]:
        """Those of the wanted figures that can be drawn."""
        lacking = set(() if self.teacher else OF_TEACHER)
        lacking |= set(() if self.backend else ("similarity",))
        lacking |= set(() if self.by_name else ("similarity", "predictions"))
        return [name for name in wanted if name not in lacking]


class FigureSet:
    """Draws figures of fixed images; images are read when they are first drawn.

    Drawing changes nothing that training depends on: the default generators draw afterwards what
    they would have drawn, every module is in the mode it was in, and gradients are not touched.

    Args:
        cfg: config of a stage, or of a whole run.
        models: of that stage.
        count: images a figure.
        resized: validation images have the size that evaluation gives them, not their own. (With
            INPUT.TILE, predictions are of whole images, all else is of resized tiles.)
        point: (x, y) in pixels of the image, for similarities; None: inside the largest instance.
    """

    def __init__(
        self,
        cfg: CfgNode,
        models: FigureModels,
        count: int,
        *,
        resized: bool = False,
        point: tuple[float, float] | None = None,
    ) -> None:
        self.models = models
        self.order = cfg.INPUT.FORMAT
        self.point = point
        self.names = functools.cache(lambda: class_names(cfg))
        tiled = bool(cfg.INPUT.TILE.SIZE)  # each is resized on its own
        whole = functools.partial(validation_samples, cfg, count, resized=resized and not tiled)
        tiles = functools.partial(validation_samples, cfg, count, tiles=True, resized=True)
        self._whole = functools.cache(whole)
        self._validation = functools.cache(tiles) if tiled else self._whole
        self._labeled = functools.cache(lambda: labeled_samples(cfg, count, DRAWS))
        self._unlabeled = functools.cache(lambda: unlabeled_samples(cfg, count))
        self._strong_view = StrongView(cfg).batch
        self._refines = cfg.S4M.REFINE.ENABLED
        # Without a teacher neither of the figures is drawn that use it.
        self._labeling: Any = _labeling(cfg, models) if models.teacher else None
        self._predictor = functools.partial(Predictor, cfg)

    def draw(self, name: str) -> np.ndarray:
        """One of FIGURES, (H, W, 3) uint8 RGB.

        Raises:
            S4MError: an image or annotation is missing or malformed, or a model lacks something.
        """
        with undisturbed(*self.models.by_name.values()):
            return getattr(self, f"_{name}_panels")().draw()

    def _labeled_panels(self) -> Panels:
        return labeled_panels(self._labeled(), self.names(), self.order)

    def _views_panels(self) -> Panels:
        samples = self._unlabeled()
        generators = sample_generators(samples, "strong_view", "cpu")
        strong = self._strong_view([sample["image"] for sample in samples], generators)
        return view_panels(samples, strong, self.order)

    def _pseudo_labels_panels(self) -> Panels:
        # One by one: the memory of an image suffices, whatever their number.
        views = [self._labeling([sample]) for sample in self._validation()]
        selections = [selection for view in views for selection in view.selections]
        refined = [labels for view in views for labels in view.refined]
        return pseudo_label_panels(
            self._validation(), selections, refined, self.names(), self.order, refines=self._refines
        )

    def _arp_panels(self) -> Panels:
        views = self._labeling(self._validation())
        return arp_panels(self._validation(), views, self.names(), self.order)

    def _similarity_panels(self) -> Panels:
        samples = self._validation()
        points = [self.point or point_of(sample) for sample in samples]
        distillation = StructuralDistillation(backend=self.models.backend)
        return similarity_panels(samples, points, self.models.by_name, distillation, self.order)

    def _predictions_panels(self) -> Panels:
        samples, found = self._whole(), {}
        for name, model in self.models.by_name.items():
            predict = self._predictor(model)
            found[name] = [
                predict(to_rgb(sample["image"], self.order), SCORE_SHOWN) for sample in samples
            ]
        return prediction_panels(samples, found, self.names(), self.order)


def _labeling(cfg: CfgNode, models: FigureModels) -> PseudoLabeling:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.S4M.ARP.PAIR_FRACTION = PAIR_ALL
    cfg.freeze()
    return PseudoLabeling(cfg, models.teacher, models.backend)


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Inside, models are in eval mode and nothing takes gradients; afterwards all is as before.

    The modes of all their modules, and the default generators' states.
    """
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad(), undisturbed_generators():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


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
    names = models.choose(settings.WHAT)
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
