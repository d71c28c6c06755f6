"""The EMA teacher: what moves, what is copied, what stays frozen, through burn-in."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.semi.ema_teacher import EMATeacher, TeacherPhase, teacher_phase

EMA = TeacherPhase.EMA


class Model(nn.Module):
    """A parameter, two floating-point buffers (one not saved), an integer and a bool buffer."""

    def __init__(self, value: float, count: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value))
        self.part = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
        self.register_buffer("running", torch.full((2,), 10 * value))
        self.register_buffer("scratch", torch.full((1,), -value), persistent=False)
        self.register_buffer("count", torch.tensor(count))
        self.register_buffer("flag", torch.tensor(count > 0))

    def forward(self, x):
        return self.part(x) * self.weight


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def test_one_step_by_hand():
    teacher, student = Model(1.0, count=3), Model(2.0, count=7)
    ema = EMATeacher(teacher, decay=0.75)
    ema.step(student, EMA)
    assert teacher.weight.tolist() == [1.25, 1.25]
    assert teacher.running.tolist() == [12.5, 12.5]
    assert teacher.scratch.tolist() == [-1.25]
    assert teacher.count.item() == 7 and teacher.flag.item() is True
    ema.step(student, EMA)
    assert teacher.weight.tolist() == [1.4375, 1.4375]
    assert student.weight.tolist() == [2.0, 2.0] and student.weight.requires_grad
    assert not teacher(torch.ones(2, 2)).requires_grad
    student.teacher = ema
    assert len(list(student.parameters())) == len(list(teacher.parameters()))  # no submodule


def test_what_is_equal_in_both_does_not_drift():
    teacher, student = Model(0.1), Model(0.1)
    before = values(teacher)
    ema = EMATeacher(teacher, decay=0.9996)
    for _ in range(50):
        ema.step(student, EMA)
    assert all(torch.equal(before[name], value) for name, value in values(teacher).items())


def test_nothing_puts_the_teacher_or_its_copy_into_train_mode():
    teacher = Model(1.0).train()
    assert EMATeacher(teacher, decay=0.5).model is teacher
    for model in (teacher, copy.deepcopy(teacher)):
        container = nn.ModuleList([model])
        for module in (model, model.part, model.part[1], container):
            assert module.train() is module
            assert not any(part.training for part in model.modules())
        assert container.training


def changed(change):
    student = Model(2.0)
    change(student)
    return student


@pytest.mark.parametrize("phase", [TeacherPhase.COPY, EMA])
def test_another_architecture_is_refused_before_anything_changes(phase):
    teacher = Model(1.0)
    ema = EMATeacher(teacher, decay=0.5)
    before = values(teacher)
    for student, named in (
        (nn.Sequential(Model(2.0)), "'weight'"),
        (changed(lambda s: setattr(s.part, "1", nn.BatchNorm1d(3))), r"'part.1.weight' is .*\[2\]"),
        (changed(lambda s: s.register_buffer("extra", torch.zeros(1))), "'extra'"),
        (Model(2.0).half(), r"'weight' is .*float16"),
    ):
        with pytest.raises(InputError, match=named):
            ema.step(student, phase)
        assert all(torch.equal(before[name], value) for name, value in values(teacher).items())
    for decay in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="S4M.EMA_DECAY"):
            EMATeacher(Model(1.0), decay)


def test_a_shared_tensor_moves_once():
    def tied(value):
        model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)])
        model[1].weight = model[0].weight
        nn.init.constant_(model[0].weight, value)
        return model

    teacher = tied(0.0)
    EMATeacher(teacher, decay=0.5).step(tied(1.0), EMA)
    assert teacher[1].weight.item() == 0.5


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
