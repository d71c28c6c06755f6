"""Hooks of the teacher–student training. Any Detectron2 trainer can register them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from torch import nn

from s4m_d2.engine.rng import derive_seed, seed_default_generators
from s4m_d2.semi.burn_in import TeacherPhase, teacher_phase
from s4m_d2.semi.ema_teacher import EMATeacher

logger = logging.getLogger(__name__)


class EMATeacherHook(HookBase):
    """Burn-in and EMA of the teacher (Guided Distillation, section 3.2).

    Before iteration i, and so before the teacher labels that iteration's batch: nothing happens
    while i < ``burn_in``; at i == ``burn_in`` the teacher becomes a copy of the student; afterwards
    its weights move towards the student's by ``1 - decay``. Where a run continues decides what
    happens, so a resumed run neither repeats nor loses its burn-in. The teacher's weights are part
    of the trainer's state.

    Args:
        teacher: the frozen model and its update rule.
        student: the model that is trained, without a DDP wrapper.
        burn_in: iterations for which the stage-1 teacher stays frozen.
    """

    def __init__(self, teacher: EMATeacher, student: nn.Module, burn_in: int) -> None:
        self.teacher = teacher
        self.student = student
        self.burn_in = burn_in
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
        self.teacher.step(self.student, phase)
        get_event_storage().put_scalar("teacher/phase", phase.value, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.model.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.teacher.model.load_state_dict(state_dict["teacher"])
        self.restored = True


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
