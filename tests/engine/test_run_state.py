"""Positions, settings and random states in checkpoints, in a plain Detectron2 trainer."""

import logging
import random

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.rng import default_generator_states, restore_default_generators
from s4m_d2.engine.training.hooks import RunStateHook, changes, continuation_errors
from s4m_d2.errors import WeightsError

from .stopped_ranks import Line
from .test_hooks import trainer_of

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


@pytest.fixture(autouse=True)
def generators_as_before():
    states = default_generator_states()
    yield
    restore_default_generators(states)


def draw() -> list[float]:
    """One draw of each default generator; normal ones, of which two are made at a time."""
    return [torch.randn(()).item(), np.random.normal(), random.gauss(0, 1)]


class FirstDraws(HookBase):
    """Draws before the first step, as a user's component may."""

    def before_train(self):
        self.values = draw()


def checkpointer(trainer, folder) -> S4MCheckpointer:
    return S4MCheckpointer(trainer.model, str(folder), trainer=trainer)


def run_and_save(folder, *hooks):
    """Train, then save as Detectron2's hook does within the last iteration; what comes next."""
    trainer = trainer_of(Line(), *hooks)
    trainer.train(0, 3)
    trainer.iter = 2
    checkpointer(trainer, folder).save("model")
    return draw()


def resume(folder):
    first_draws = FirstDraws()
    trainer = trainer_of(Line(), RunStateHook(SETTINGS), first_draws)
    checkpointer(trainer, folder).resume_or_load("")
    trainer.train(trainer.iter + 1, 4)
    return first_draws.values


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_draws_before_the_first_step_draws_as_in_the_unbroken_run(tmp_path, caplog):
    expected = run_and_save(tmp_path, RunStateHook(SETTINGS))
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
        errors = [str(error) for error in continuation_errors(finished, SETTINGS, now)]
        assert len(errors) == len(expected)
        assert all(error.startswith(key) for error, key in zip(errors, expected, strict=True))


def test_every_changed_setting_is_named_with_both_values():
    for name, before in SETTINGS.items():
        (change,) = changes(SETTINGS, SETTINGS | {name: 77})
        assert change.startswith(name) and str(before) in change and "77" in change
    assert not list(changes({}, SETTINGS))  # a file that does not say


def test_only_a_continued_run_without_this_state_is_warned(tmp_path, caplog):
    run_and_save(tmp_path)
    trainer_of(Line(), RunStateHook(SETTINGS)).train(0, 2)
    assert warnings_in(caplog) == []
    resume(tmp_path)
    (warning,) = warnings_in(caplog)
    assert "iteration 3" in warning


def test_an_optimizer_of_another_model_is_a_users_mistake(tmp_path):
    run_and_save(tmp_path)
    trainer = trainer_of(Line(), RunStateHook(SETTINGS))
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(WeightsError, match="'trainer'"):
        checkpointer(trainer, tmp_path).resume_or_load("")
