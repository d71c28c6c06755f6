"""The teacher: a frozen model, after burn-in the EMA of the student (Guided Distillation)."""

from enum import Enum
from itertools import chain
from types import MethodType

import torch
from torch import Tensor, nn

from s4m_d2.errors import InputError, require


class TeacherPhase(Enum):
    """Update of the teacher before it labels an iteration's batch; values are logged."""

    FROZEN = 0  #: none: the stage-1 teacher
    COPY = 1  #: copied from the student
    EMA = 2  #: exponential moving average of the student


def teacher_phase(iteration: int, burn_in: int) -> TeacherPhase:
    """The phase of ``iteration`` (from 0): frozen before ``burn_in``, a copy at it, then EMA."""
    require("S4M.BURN_IN", burn_in, burn_in >= 0, "0 or more iterations")
    if iteration < burn_in:
        return TeacherPhase.FROZEN
    return TeacherPhase.COPY if iteration == burn_in else TeacherPhase.EMA


class EMATeacher:
    """Freezes a model, in place, and updates it from a student of the same architecture.

    The model stays in eval mode: ``train()`` on it, on a part of it or on a module that contains it
    has no effect on it. Not an ``nn.Module``: as an attribute it adds no weights to a model.

    Args:
        teacher: the model.
        decay: d in ``teacher <- d * teacher + (1 - d) * student``, in [0, 1].
    """

    def __init__(self, teacher: nn.Module, decay: float) -> None:
        require("S4M.EMA_DECAY", decay, 0 <= decay <= 1, "a number in [0, 1]")
        self.model = teacher.eval().requires_grad_(False)
        self.decay = decay
        for module in teacher.modules():
            module.train = MethodType(_stay_in_eval, module)  # type: ignore[method-assign]

    @torch.no_grad()
    def step(self, student: nn.Module, phase: TeacherPhase) -> None:
        """Update the teacher as ``phase`` requires, before it labels the iteration's batch.

        The EMA is of floating-point parameters and buffers; other buffers are copied. ``student``
        is the bare model: unwrap it from DistributedDataParallel first. InputError names the first
        tensor in which the two models differ in name, shape or dtype; nothing is changed then.
        """
        if phase is TeacherPhase.FROZEN:
            return
        for mine, theirs in _pairs(self.model, student):
            if phase is TeacherPhase.EMA and mine.is_floating_point():
                mine.lerp_(theirs, 1.0 - self.decay)
            else:
                mine.copy_(theirs)


def _pairs(teacher: nn.Module, student: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Pair parameters and all buffers by name, non-persistent ones included."""
    mine, theirs = (
        dict(chain(model.named_parameters(), model.named_buffers())) for model in (teacher, student)
    )
    for name in chain(mine, theirs):
        a, b = ((m[name].shape, m[name].dtype) if name in m else None for m in (mine, theirs))
        if a != b:
            raise InputError(
                f"{name!r} is {a} in the teacher and {b} in the student: both need the same "
                "architecture (unwrap a DistributedDataParallel student)"
            )
    return [(mine[name], theirs[name]) for name in mine]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
