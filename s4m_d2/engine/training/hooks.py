"""Hooks of the teacher–student training. Any Detectron2 trainer can register them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from s4m_d2.engine.rng import derive_seed, seed_default_generators
from s4m_d2.engine.training.bad_steps import BadSteps
from s4m_d2.errors import ConfigError
from s4m_d2.semi.burn_in import TeacherPhase, teacher_phase
from s4m_d2.semi.ema_teacher import EMATeacher

logger = logging.getLogger(__name__)

COUNT = "pseudo_labels/per_image"


class EMATeacherHook(HookBase):
    """Burn-in and EMA of the teacher (Guided Distillation, section 3.2).

    Before iteration i, and so before the teacher labels that iteration's batch: nothing happens
    while i < ``burn_in``; at i == ``burn_in`` the teacher becomes a copy of the student; afterwards
    its weights move towards the student's by ``1 - decay``. Where a run continues decides what
    happens, so a resumed run neither repeats nor loses its burn-in. The teacher's weights are part
    of the trainer's state. After a step that was skipped the teacher is not averaged: there is
    nothing new to follow.

    Args:
        teacher: the frozen model and its update rule.
        student: the model that is trained, without a DDP wrapper.
        burn_in: iterations for which the stage-1 teacher stays frozen.
        bad_steps: knows which steps were skipped; None: none are.
    """

    def __init__(
        self,
        teacher: EMATeacher,
        student: nn.Module,
        burn_in: int,
        bad_steps: BadSteps | None = None,
    ) -> None:
        self.teacher = teacher
        self.student = student
        self.burn_in = burn_in
        self.bad_steps = bad_steps
        self.restored = False  # whether the teacher's weights are a checkpoint's

    @property
    def phase(self) -> TeacherPhase:
        """The teacher's state in the trainer's current iteration, or in the last one of a run."""
        last = self.trainer.max_iter - 1  # after training, the trainer's iteration is past it
        return teacher_phase(min(self.trainer.iter, last), self.burn_in)

    def before_step(self) -> None:
        phase = self.phase
        if phase is TeacherPhase.COPY:
            logger.info("Burn-in ends: the teacher becomes a copy of the student.")
        skipped = self.bad_steps is not None and self.bad_steps.in_a_row > 0
        if not (skipped and phase is TeacherPhase.EMA):
            self.teacher.step(self.student, phase)
        get_event_storage().put_scalar("teacher/phase", phase.value, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.model.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.teacher.model.load_state_dict(state_dict["teacher"])
        self.restored = True


class PseudoLabelCountHook(HookBase):
    """Warns when the teacher labels next to nothing, or nearly everything it is asked for.

    Watches the logged ``pseudo_labels/per_image``, exponentially averaged over about SMOOTHING
    iterations (the first ones evenly). Once the average has been outside the band for
    ``iterations`` in a row, the main process warns; it warns again only after the average has come
    back. Where it stands is part of the trainer's state.

    Args:
        band: least and largest number of pseudo-labels an image that are no cause for concern.
        iterations: for which the average must be outside; 0 switches the warning off.
    """

    SMOOTHING = 20

    def __init__(self, band: Sequence[float], iterations: int) -> None:
        if len(band) != 2 or not 0 <= band[0] <= band[1]:
            raise ConfigError(
                f"S4M.PSEUDO_LABEL.COUNT_BAND is {band!r}; expected two numbers of at least 0, the "
                "smaller first."
            )
        self.low, self.high = band
        self.iterations = iterations
        self.average, self.averaged = 0.0, 0
        self.outside = 0  # iterations in a row

    def after_step(self) -> None:
        count, iteration = get_event_storage().latest().get(COUNT, (0.0, None))
        if iteration != self.trainer.iter:
            return  # nothing was labeled
        self.averaged += 1
        self.average += (count - self.average) / min(self.averaged, self.SMOOTHING)
        self.outside = 0 if self.low <= self.average <= self.high else self.outside + 1
        if 0 < self.outside == self.iterations and comm.is_main_process():
            few = self.average < self.low
            logger.warning(
                "The teacher gives %.2f pseudo-labels an image, and for %d iterations it has been "
                "%s (S4M.PSEUDO_LABEL.COUNT_BAND). If its results have fallen since stage 1, raise "
                "S4M.BURN_IN or S4M.EMA_DECAY or lower SOLVER.BASE_LR; if not, %s "
                "S4M.PSEUDO_LABEL.SCORE_THRESH.",
                self.average,
                self.iterations,
                f"less than {self.low:g}" if few else f"more than {self.high:g}",
                "lower" if few else "raise",
            )

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "averaged": self.averaged, "outside": self.outside}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.average, self.averaged = state_dict["average"], state_dict["averaged"]
        self.outside = state_dict["outside"]


class SeedHook(HookBase):
    """Make what the default generators draw in an iteration a function of that iteration.

    Those of PyTorch, NumPy and Python. Our own draws have generators of their own; this covers
    draws inside other libraries' layers (dropout and the like) and users' components, on every
    process, so that a continued run does not depend on the run before it.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self.rank = rank

    def before_step(self) -> None:
        seed_default_generators(derive_seed(self.seed, "iteration", self.trainer.iter, self.rank))


class BufferSyncHook(HookBase):
    """Give the model of every process the first one's buffers after each step.

    DDP keeps parameters alike. Buffers it leaves alone in Detectron2's trainers, so that the
    running averages of a plain BatchNorm, each over the images of one process, would make the EMA
    teachers label differently, and each process evaluate another model than the one that is saved.
    FrozenBN and SyncBN have the same buffers everywhere, which stay as they are.

    Register it before hooks that save, average or evaluate the model.

    Args:
        model: the trained model, without a DDP wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def after_step(self) -> None:
        buffers = list(self.model.buffers())
        if comm.get_world_size() == 1 or not buffers:
            return
        parts = [buffer.contiguous().reshape(-1).view(torch.uint8) for buffer in buffers]
        content = torch.cat(parts)
        dist.broadcast(content, src=0)
        for buffer, part in zip(buffers, content.split([len(p) for p in parts]), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))  # clone: alignment


class FinishedEvalHook(EvalHook):
    """Detectron2's hook, but for a run that fails in its last iteration.

    Detectron2 evaluates then too. A process that has failed would wait in the evaluation for the
    others, which wait for its gradients.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
