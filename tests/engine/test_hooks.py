"""Hooks in a plain Detectron2 trainer: the teacher's, seeds, the last evaluation."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

from s4m_d2.engine.rng import default_generator_states, restore_default_generators
from s4m_d2.engine.training.hooks import EMATeacherHook, FinishedEvalHook, SeedHook
from s4m_d2.semi.ema_teacher import EMATeacher

DECAY = 0.75
BURN_IN = 2


class Line(nn.Module):
    """One weight whose gradient is always 1, and buffers of both kinds."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("average", torch.tensor(0.0))

    def forward(self, data):
        self.steps += 1
        self.average += 0.5
        return {"loss": self.weight * 1.0}


class Recorder(HookBase):
    """The teacher's state while each step runs."""

    def __init__(self, teacher: EMATeacher) -> None:
        self.teacher = teacher
        self.seen: dict[int, tuple[float, int, float]] = {}

    def before_step(self) -> None:
        model = self.teacher.model
        values = (model.weight.item(), model.steps.item(), model.average.item())
        self.seen[self.trainer.iter] = values


def make_trainer(student: Line, teacher: Line):
    ema = EMATeacher(teacher, DECAY)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    trainer = SimpleTrainer(student, itertools.repeat(None), optimizer)
    recorder = Recorder(ema)
    trainer.register_hooks([EMATeacherHook(ema, student, BURN_IN), recorder])
    return trainer, recorder


# The student's weight is 10 - i before iteration i; it has made i steps.
EXPECTED = {
    0: (100.0, 0, 0.0),  # frozen
    1: (100.0, 0, 0.0),
    2: (8.0, 2, 1.0),  # copied
    3: (0.75 * 8.0 + 0.25 * 7.0, 3, 0.75 * 1.0 + 0.25 * 1.5),  # EMA; integers are copied
    4: (0.75 * 7.75 + 0.25 * 6.0, 4, 0.75 * 1.125 + 0.25 * 2.0),
}


def test_the_teacher_is_frozen_then_copied_then_averaged_before_it_labels():
    trainer, recorder = make_trainer(Line(10.0), Line(100.0))
    trainer.train(0, 5)
    assert recorder.seen == {i: pytest.approx(values) for i, values in EXPECTED.items()}


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_resumed_around_the_end_of_burn_in_is_the_same_run(stop):
    first, _ = make_trainer(Line(10.0), Line(100.0))
    first.train(0, stop)
    student, state = first.model.state_dict(), first.state_dict()

    second, recorder = make_trainer(Line(-1.0), Line(-1.0))
    second.model.load_state_dict(student)
    second.load_state_dict(state)
    second.train(stop, 5)
    expected = {i: values for i, values in EXPECTED.items() if i >= stop}
    assert recorder.seen == {i: pytest.approx(values) for i, values in expected.items()}


class Draw(nn.Module):
    """Draws from the default generators, as dropout and users' components do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.draws: list[tuple[float, ...]] = []

    def forward(self, data):
        self.draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return {"loss": self.weight * 1.0}


def draws(start: int, end: int, seed: int = 4, rank: int = 0) -> list[tuple[float, ...]]:
    model = Draw()
    trainer = SimpleTrainer(
        model, itertools.repeat(None), torch.optim.SGD(model.parameters(), lr=1.0)
    )
    trainer.register_hooks([SeedHook(seed, rank)])
    states = default_generator_states()
    trainer.train(start, end)
    restore_default_generators(states)
    return model.draws


def test_draws_of_an_iteration_depend_on_the_iteration_seed_and_rank_only():
    whole = draws(0, 4)
    assert draws(2, 4) == whole[2:]
    for generator in zip(*whole, strict=True):
        assert len(set(generator)) == 4
    for other in (draws(0, 4, rank=1), draws(0, 4, seed=5)):
        for mine, theirs in zip(whole, other, strict=True):
            assert all(a != b for a, b in zip(mine, theirs, strict=True))


class FailAt(HookBase):
    def __init__(self, iteration: int | None) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise ConnectionError


@pytest.mark.parametrize("fail_at", [None, 0, 2])
def test_a_run_is_evaluated_at_its_end_unless_it_fails(fail_at):
    """Even in the last iteration: the other processes are not in the evaluation."""
    model, evaluated = Draw(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    trainer.register_hooks([FailAt(fail_at), FinishedEvalHook(0, lambda: evaluated.append(True))])
    try:
        trainer.train(0, 3)
    except ConnectionError:
        assert fail_at is not None
    assert len(evaluated) == (fail_at is None)
