"""The project's training step, and the parts of it that the benchmark calls."""

import itertools
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from benchmarking.bench import Bench
from s4m_d2.engine import BadSteps, StudentStep, TeacherStep
from s4m_d2.engine.training.step import PRECISIONS
from s4m_d2.semi.ema_teacher import TeacherPhase
from s4m_d2.semi.refinement import sample_mask_points
from s4m_d2.structures import sample_generators


def points(bench: Bench, selected: Sequence) -> list[tuple[Tensor, ...]]:
    """Clicks in every mask of the batch, and their labels."""
    generators = sample_generators(bench.unlabeled, "refine_points", "cpu")
    count = itertools.repeat(bench.cfg.S4M.REFINE.NUM_POINTS)
    drawn = map(sample_mask_points, selected, count, generators)
    return list(zip(*drawn, strict=True))


@torch.no_grad()
def refine(bench: Bench, selected: Sequence) -> list:
    """Refined pseudo-labels, with SAM's passes left out: points, best masks, image size."""
    with bench.autocast(), patch.object(bench.answers, "passes", False):
        return bench.labeling.refine(bench.weak, selected).labels


def exchange(bench: Bench, images: Sequence[Tensor], labels: Sequence):
    """ARP."""
    return bench.labeling.arp(images, labels, sample_generators(bench.unlabeled, "arp", "cpu"))


def strong_views(bench: Bench, images: Sequence[Tensor]) -> list[Tensor]:
    """The student's images."""
    generators = sample_generators(bench.unlabeled, "strong_view", "cpu")
    return bench.labeling.strong_view(images, generators)


def student_outputs(bench: Bench, batches: Sequence[list[dict]]) -> list[dict]:
    """What the student's forward in training hands to the criterion, instead of losses."""
    seen: list[dict] = []
    keep = patch.object(bench.student.criterion, "forward", lambda x, *_: seen.append(x) or {})
    with keep, patch.object(bench.student, "distillation", None), bench.autocast():
        for batch in batches:
            bench.student(batch)
    return seen


def losses(bench: Bench) -> dict[str, Tensor]:
    """All losses of a step, from its batches on."""
    step = stage_step(bench)
    with bench.autocast():
        if bench.stage == 1:
            return step.model(bench.labeled)
        views = bench.labeling(bench.unlabeled)
        return step.model(bench.labeled) | step.weighted(step.model(views.student_batch))


def stage_step(bench: Bench) -> TeacherStep:
    """The stage's step, around the same batch again and again."""
    precision = PRECISIONS[bench.cfg.S4M.AMP_PRECISION] if bench.half else None
    bad_steps = BadSteps(1_000_000, "unused", seed=0)
    batch = bench.labeled if bench.stage == 1 else (bench.labeled, bench.unlabeled)
    parts = (bench.student, itertools.repeat(batch), bench.optimizer, bad_steps, precision)
    if bench.stage == 1:
        return TeacherStep(*parts)
    weight = bench.cfg.S4M.UNSUP_LOSS_WEIGHT
    return StudentStep(*parts, labeling=bench.labeling, unsup_loss_weight=weight)


def training_step(bench: Bench) -> Callable[[], None]:
    """The stage's step; a call makes one.

    In stage 2 the EMA update comes first, as EMATeacherHook makes it.
    """
    trainer = stage_step(bench)
    trainer.iter = trainer.start_iter = 0

    def step() -> None:
        with EventStorage(0) as trainer.storage:
            if bench.teacher is not None:
                bench.teacher.step(bench.student, TeacherPhase.EMA)
            trainer.run_step()

    return step
