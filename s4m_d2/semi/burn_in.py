"""Burn-in: phases of the teacher in stage 2 (Guided Distillation)."""

from __future__ import annotations

from enum import Enum

from s4m_d2.errors import require


class TeacherPhase(Enum):
    """Update of the teacher before it labels an iteration's batch; values are logged."""

    FROZEN = 0  #: none: the stage-1 teacher
    COPY = 1  #: copied from the student
    EMA = 2  #: exponential moving average of the student


def teacher_phase(iteration: int, burn_in: int) -> TeacherPhase:
    """The phase of ``iteration`` (from 0): frozen before ``burn_in``, a copy at it, then EMA.

    >>> [teacher_phase(i, burn_in=1).name for i in range(3)]
    ['FROZEN', 'COPY', 'EMA']
    """
    require("S4M.BURN_IN", burn_in, burn_in >= 0, "0 or more iterations")
    if iteration < burn_in:
        return TeacherPhase.FROZEN
    return TeacherPhase.COPY if iteration == burn_in else TeacherPhase.EMA
