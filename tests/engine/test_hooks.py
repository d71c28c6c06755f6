"""Hooks in a plain Detectron2 trainer: seeds, the last evaluation; logs on a full disk."""

import itertools
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils.events import EventWriter
from torch import nn

from s4m_d2.engine.rng import default_generator_states, restore_default_generators
from s4m_d2.engine.training.hooks import FinishedEvalHook, ForgivingWriter, SeedHook


class Draw(nn.Module):
    """Draws from the default generators, as dropout and users' components do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.draws: list[tuple[float, ...]] = []

    def forward(self, data):
        self.draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return {"loss": self.weight * 1.0}


def trainer_of(model: nn.Module, *hooks: HookBase) -> SimpleTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    trainer.register_hooks(hooks)
    return trainer


def draws(start: int, end: int, seed: int = 4, rank: int = 0) -> list[tuple[float, ...]]:
    trainer = trainer_of(model := Draw(), SeedHook(seed, rank))
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


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_is_evaluated_at_its_end_unless_it_fails_even_in_the_last_iteration(fails):
    evaluated = []
    trainer = trainer_of(Draw(), FinishedEvalHook(0, lambda: evaluated.append(True)))
    trainer.data_loader = iter([None] * (2 if fails else 3))
    with pytest.raises(StopIteration) if fails else nullcontext():
        trainer.train(0, 3)
    assert len(evaluated) == (not fails)


class Flaky(EventWriter):
    def __init__(self, *fails):
        self.fails, self.calls = iter(fails), 0

    def write(self):
        self.calls += 1
        if next(self.fails):
            raise OSError(28, "No space left on device")


def test_each_outage_of_a_writer_is_reported_once_and_ends_nothing(caplog):
    inner = Flaky(False, True, True, False, True)
    writer = ForgivingWriter(inner)
    counts = []
    for _ in range(5):
        writer.write()
        counts.append(len(caplog.records))
    assert counts == [0, 1, 1, 1, 2] and inner.calls == 5
    assert "Flaky cannot write" in caplog.text and "No space left" in caplog.text
