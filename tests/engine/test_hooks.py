"""Hooks in a plain Detectron2 trainer: seeds, states in checkpoints, the last evaluation, logs."""

import itertools
import logging
import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.rng import undisturbed_generators
from s4m_d2.engine.training import hooks
from s4m_d2.errors import WeightsError


@pytest.fixture(autouse=True)
def generators_as_before():
    with undisturbed_generators():
        yield


class Draw(nn.Module):
    """Draws from the default generators, as dropout and users' components do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.draws: list[tuple[float, ...]] = []

    def forward(self, data):
        self.draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
        return {"loss": self.weight * 1.0}


def trainer_of(model: nn.Module, *registered: HookBase) -> SimpleTrainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    trainer.register_hooks(registered)
    return trainer


def draws(start: int, end: int, seed: int = 4) -> list[tuple[float, ...]]:
    trainer = trainer_of(model := Draw(), hooks.RunStateHook({"SEED": seed}))
    trainer.train(start, end)
    return model.draws


def test_draws_of_an_iteration_depend_on_the_iteration_seed_and_rank_only(monkeypatch):
    whole = draws(0, 4)
    assert draws(2, 4) == whole[2:]
    for generator in zip(*whole, strict=True):
        assert len(set(generator)) == 4
    other_seed = draws(0, 4, seed=5)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    for other in (other_seed, draws(0, 4)):
        for mine, theirs in zip(whole, other, strict=True):
            assert all(a != b for a, b in zip(mine, theirs, strict=True))


class Flaky(EventWriter):
    def __init__(self, *fails):
        self.fails, self.calls = iter(fails), 0

    def write(self):
        self.calls += 1
        if next(self.fails):
            raise OSError(28, "No space left on device")


def test_each_outage_of_a_writer_is_reported_once_and_ends_nothing(caplog):
    inner = Flaky(False, True, True, False, True)
    writer = hooks.ForgivingWriter(inner)
    counts = []
    for _ in range(5):
        writer.write()
        counts.append(len(caplog.records))
    assert counts == [0, 1, 1, 1, 2] and inner.calls == 5
    assert "Flaky cannot write" in caplog.text and "No space left" in caplog.text


SETTINGS = {
    "SEED": 3,
    "DATASETS.TRAIN": ("toys_10pct",),
    "S4M.SPLIT_SEED": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_ITER": 4,
    "processes": 1,
    "DATASETS.UNLABELED": ("toys_unlabeled",),
    "S4M.UNLABELED_IMS_PER_BATCH": 6,
    "S4M.BURN_IN": 5,
    "S4M.EMA_DECAY": 0.5,
}


def draw() -> list[float]:
    """One draw of each default generator; normal ones, of which two are made at a time."""
    return [torch.randn(()).item(), np.random.normal(), random.gauss(0, 1)]


class FirstDraws(HookBase):
    """Draws before the first step, as a user's component may."""

    def before_train(self):
        self.values = draw()


def checkpointer(trainer, folder) -> S4MCheckpointer:
    return S4MCheckpointer(trainer.model, str(folder), trainer=trainer)


def run_and_save(folder, *registered):
    """Train, then save as Detectron2's hook does within the last iteration; what comes next."""
    trainer = trainer_of(Draw(), *registered)
    trainer.train(0, 3)
    trainer.iter = 2
    checkpointer(trainer, folder).save("model")
    return draw()


def resume(folder):
    first_draws = FirstDraws()
    trainer = trainer_of(Draw(), hooks.RunStateHook(SETTINGS), first_draws)
    checkpointer(trainer, folder).resume_or_load("")
    trainer.train(trainer.iter + 1, 4)
    return first_draws.values


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_draws_before_the_first_step_draws_as_in_the_unbroken_run(tmp_path, caplog):
    expected = run_and_save(tmp_path, hooks.RunStateHook(SETTINGS))
    content = torch.load(tmp_path / "model.pth", weights_only=True)  # plain data
    assert content["trainer"]["hooks"]["RunStateHook"]["settings"] == SETTINGS
    torch.manual_seed(99)  # the new process
    np.random.seed(99)
    random.seed(99)
    assert resume(tmp_path) == expected
    assert warnings_in(caplog) == []


def test_settings_with_which_a_run_cannot_continue():
    for finished, changed, expected in (
        (4, {}, []),
        (5, {"SOLVER.MAX_ITER": 4}, ["SOLVER.MAX_ITER"]),
        (5, {"S4M.BURN_IN": 9}, []),  # the teacher is copied next, or later
        (6, {"S4M.BURN_IN": 9}, ["S4M.BURN_IN"]),  # it was copied
        (6, {"S4M.BURN_IN": 6}, ["S4M.BURN_IN"]),
        (3, {"S4M.BURN_IN": 3}, []),
        (3, {"S4M.BURN_IN": 2}, ["S4M.BURN_IN"]),  # it should have been copied
        (9, {"SOLVER.MAX_ITER": 8, "S4M.BURN_IN": 2}, ["SOLVER.MAX_ITER", "S4M.BURN_IN"]),
    ):
        now = SETTINGS | {"SOLVER.MAX_ITER": 9} | changed
        errors = [str(error) for error in hooks.continuation_errors(finished, SETTINGS, now)]
        assert len(errors) == len(expected)
        assert all(error.startswith(key) for error, key in zip(errors, expected, strict=True))


def test_only_a_continued_run_without_this_state_is_warned(tmp_path, caplog):
    run_and_save(tmp_path)
    trainer_of(Draw(), hooks.RunStateHook(SETTINGS)).train(0, 2)
    assert warnings_in(caplog) == []
    resume(tmp_path)
    (warning,) = warnings_in(caplog)
    assert "iteration 3" in warning


def test_an_optimizer_of_another_model_is_a_users_mistake(tmp_path):
    run_and_save(tmp_path)
    trainer = trainer_of(Draw(), hooks.RunStateHook(SETTINGS))
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(WeightsError, match="'trainer'"):
        checkpointer(trainer, tmp_path).resume_or_load("")


BAND, ITERATIONS = (1.0, 20.0), 5


class Counts(TrainerBase):
    """Logs a number of pseudo-labels in each iteration; None: the iteration labels nothing."""

    def __init__(self, counts, hook) -> None:
        super().__init__()
        self.counts = counts
        self.register_hooks([hooks.UnwrittenMetricsHook("none"), hook])

    def run_step(self) -> None:
        if self.counts[self.iter] is not None:
            get_event_storage().put_scalar(hooks.COUNT, self.counts[self.iter])


def hook(smoothing=1, iterations=ITERATIONS):
    made = hooks.PseudoLabelCountHook(BAND, iterations)
    made.SMOOTHING = smoothing
    return made


@pytest.fixture
def warnings(caplog):
    """(trainer, start) → messages of a run over its counts."""
    caplog.set_level(logging.WARNING, logger="s4m_d2")

    def run(trainer, start=0):
        before = len(caplog.records)
        trainer.train(start, len(trainer.counts))
        return [record.getMessage() for record in caplog.records[before:]]

    return run


def test_one_warning_for_each_time_outside_long_enough(warnings):
    for counts, options, expected in (
        ([1.0] * 20 + [20.0] * 20, {}, 0),  # the band's ends belong to it
        ([0.5] * (ITERATIONS - 1) + [5.0], {}, 0),
        ([0.5] * 50, {}, 1),  # once an excursion
        ([80.0] * ITERATIONS, {}, 1),
        (([0.5] * ITERATIONS + [5.0]) * 3, {}, 3),
        (([0.5] * (ITERATIONS - 1) + [5.0]) * 3, {}, 0),  # not in a row
        ([0.5, None] * (ITERATIONS - 1), {}, 0),  # an old value is not counted twice
        ([0.5, None] * ITERATIONS, {}, 1),
        ([0.0, 9.0] * 100, {"smoothing": 20}, 0),  # the mean is inside, half of them are not
        ([0.0, 9.0] * 100, {"iterations": 1}, 100),
        ([0.0] * 50, {"iterations": 0}, 0),
    ):
        assert len(warnings(Counts(counts, hook(**options)))) == expected


def test_a_continued_run_warns_where_the_unbroken_one_does(warnings):
    counts = [3.0, 0.5, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    whole = warnings(Counts(counts, hook(smoothing=2)))
    assert len(whole) == 1
    for stop in range(1, len(counts)):
        first, second = (Counts(part, hook(smoothing=2)) for part in (counts[:stop], counts))
        told = warnings(first)
        first.iter = stop - 1  # as a checkpoint is saved
        second.load_state_dict(first.state_dict())
        assert told + warnings(second, start=stop) == whole
