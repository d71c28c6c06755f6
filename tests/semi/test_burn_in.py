"""The phases of the teacher."""

import pytest

from s4m_d2.errors import InputError
from s4m_d2.semi.burn_in import TeacherPhase, teacher_phase

FROZEN, COPY, EMA = TeacherPhase.FROZEN, TeacherPhase.COPY, TeacherPhase.EMA


@pytest.mark.parametrize(
    ("burn_in", "expected"),
    [
        (0, [COPY, EMA, EMA, EMA]),
        (1, [FROZEN, COPY, EMA, EMA]),
        (3, [FROZEN, FROZEN, FROZEN, COPY]),
        (9, [FROZEN, FROZEN, FROZEN, FROZEN]),
    ],
)
def test_frozen_before_burn_in_a_copy_at_it_ema_after_it(burn_in, expected):
    assert [teacher_phase(iteration, burn_in) for iteration in range(4)] == expected


def test_negative_burn_in_is_refused():
    with pytest.raises(InputError, match="S4M.BURN_IN"):
        teacher_phase(0, -1)
