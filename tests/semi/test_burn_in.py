"""The phases of the teacher, and its weights through them."""

import io

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s4m_d2.semi.burn_in import teacher_phase
from s4m_d2.semi.ema_teacher import EMATeacher


def random_model(seed: int) -> nn.Module:
    """Random parameters and statistics in double precision, and a random count of batches."""
    rng = np.random.default_rng(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.from_numpy(rng.normal(size=value.shape)))
            else:
                value.fill_(int(rng.integers(100)))
    return model


def stopped_and_continued(ema: EMATeacher, decay: float) -> EMATeacher:
    """A teacher of other weights, into which those of a file were loaded."""
    file = io.BytesIO()
    torch.save(ema.model.state_dict(), file)
    file.seek(0)
    other = EMATeacher(random_model(seed=999), decay)
    other.model.load_state_dict(torch.load(file, weights_only=True))
    return other


@given(
    burn_in=st.integers(0, 6),
    stop=st.integers(0, 6),
    decay=st.sampled_from([0.0, 0.3, 0.9996, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_weights_follow_the_closed_form_through_a_stop_anywhere(burn_in, stop, decay, seed):
    """Before burn-in ends, b, stage 1's. In iteration i from then on, with the students s:
    d^(i-b) s_b + (1 - d) (d^(i-b-1) s_(b+1) + ... + s_i), and counts are s_i's."""
    stage_one = random_model(seed).state_dict()
    ema = EMATeacher(random_model(seed), decay)
    students = [random_model(seed + 1 + i) for i in range(6)]
    for iteration, student in enumerate(students):
        if iteration == stop:
            ema = stopped_and_continued(ema, decay)
        ema.step(student, teacher_phase(iteration, burn_in))
        for name, value in ema.model.state_dict().items():
            if iteration < burn_in:
                assert torch.equal(value, stage_one[name]), name
            elif iteration == burn_in or not value.is_floating_point():
                assert torch.equal(value, student.state_dict()[name]), name
            else:
                expected = decay ** (iteration - burn_in) * students[burn_in].state_dict()[name]
                for k in range(burn_in + 1, iteration + 1):
                    share = (1 - decay) * decay ** (iteration - k)
                    expected = expected + share * students[k].state_dict()[name]
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
