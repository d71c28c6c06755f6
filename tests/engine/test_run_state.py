"""Positions, settings and random states in checkpoints, in a plain Detectron2 trainer."""

import itertools
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.rng import default_generator_states, restore_default_generators
from s4m_d2.engine.training.run_state import RunStateHook, continuation_errors, with_scaler_state
from s4m_d2.errors import WeightsError

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


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, data):
        return {"loss": self.weight * 1.0}


def make_trainer(*hooks):
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    trainer.register_hooks(hooks)
    return trainer


def checkpointer(trainer, folder) -> S4MCheckpointer:
    return S4MCheckpointer(trainer.model, str(folder), trainer=trainer)


def run_and_save(folder, settings=SETTINGS, iterations=3):
    """Train, then save as Detectron2's hook does within the last iteration; what comes next."""
    trainer = make_trainer(RunStateHook(settings))
    trainer.train(0, iterations)
    trainer.iter = iterations - 1
    checkpointer(trainer, folder).save("model")
    return draw()


def resume(folder, settings=SETTINGS):
    first_draws = FirstDraws()
    trainer = make_trainer(RunStateHook(settings), first_draws)
    checkpointer(trainer, folder).resume_or_load("")
    trainer.train(trainer.iter + 1, 4)
    return first_draws.values


def test_generators_draw_on_from_their_saved_states():
    draw()
    states, expected = default_generator_states(), [draw() for _ in range(3)]
    draw()
    restore_default_generators(states)
    assert [draw() for _ in range(3)] == expected


def test_a_checkpoint_holds_position_settings_and_random_states_as_plain_data(tmp_path):
    run_and_save(tmp_path)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    state = content["trainer"]["hooks"]["RunStateHook"]
    assert state["settings"] == SETTINGS
    assert state["position"] == {
        "iteration": 3,
        "labeled_images": 12,
        "unlabeled_images": 18,
        "burn_in": 3,
        "next_teacher_phase": "FROZEN",
    }
    assert {"torch", "numpy", "python"} <= state["random"].keys()


@pytest.mark.parametrize(
    ("iterations", "burn_in", "phase"), [(5, 5, "COPY"), (6, 5, "EMA"), (4, 4, "FROZEN")]
)
def test_the_position_in_the_burn_in(iterations, burn_in, phase):
    hook = RunStateHook(SETTINGS)
    hook.trainer = SimpleNamespace(iter=iterations - 1)
    position = hook.state_dict()["position"]
    assert (position["burn_in"], position["next_teacher_phase"]) == (burn_in, phase)


def test_stage_one_has_no_position_in_a_burn_in():
    labeled = {k: v for k, v in SETTINGS.items() if "UNLABELED" not in k and "BURN" not in k}
    hook = RunStateHook(labeled)
    hook.trainer = SimpleNamespace(iter=2)
    assert hook.state_dict()["position"] == {"iteration": 3, "labeled_images": 12}


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_draws_before_the_first_step_draws_as_in_the_unbroken_run(tmp_path, caplog):
    expected = run_and_save(tmp_path)
    torch.manual_seed(99)  # the new process
    np.random.seed(99)
    random.seed(99)
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == expected
    assert warnings_in(caplog) == []


CHANGES = {
    "SEED": (4, "SEED was 3 when the checkpoint was written and is 4 now"),
    "SOLVER.IMS_PER_BATCH": (8, "labeled images are skipped or come again"),
    "S4M.UNLABELED_IMS_PER_BATCH": (2, "unlabeled images are skipped or come again"),
    "S4M.BURN_IN": (3, "S4M.BURN_IN was 5 when the checkpoint was written and is 3 now"),
    "S4M.EMA_DECAY": (0.9, "the teacher follows the student at another pace"),
    "SOLVER.MAX_ITER": (9, "SOLVER.MAX_ITER was 4 when the checkpoint was written and is 9 now"),
    "S4M.SPLIT_SEED": (1, "other images are labeled"),
    "DATASETS.TRAIN": (("toys_5pct",), "other labeled images come next"),
    "DATASETS.UNLABELED": ((), "other unlabeled images come next"),
    "processes": (2, "processes was 1 when the checkpoint was written and is 2 now"),
}


@pytest.mark.parametrize(
    ("finished", "changed", "expected"),
    [
        (4, {}, []),
        (5, {"SOLVER.MAX_ITER": 4}, ["SOLVER.MAX_ITER"]),
        (5, {"S4M.BURN_IN": 9}, []),  # the teacher is copied next, or later
        (6, {"S4M.BURN_IN": 9}, ["S4M.BURN_IN"]),  # it was copied
        (6, {"S4M.BURN_IN": 6}, ["S4M.BURN_IN"]),
        (3, {"S4M.BURN_IN": 3}, []),
        (3, {"S4M.BURN_IN": 2}, ["S4M.BURN_IN"]),  # it should have been copied
        (9, {"SOLVER.MAX_ITER": 8, "S4M.BURN_IN": 2}, ["SOLVER.MAX_ITER", "S4M.BURN_IN"]),
    ],
)
def test_settings_with_which_a_run_cannot_continue(finished, changed, expected):
    now = SETTINGS | {"SOLVER.MAX_ITER": 9} | changed
    errors = [str(error) for error in continuation_errors(finished, SETTINGS, now)]
    assert len(errors) == len(expected)
    assert all(error.startswith(key) for error, key in zip(errors, expected, strict=True))


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_continues_with_other_settings_is_warned(tmp_path, caplog, name):
    value, message = CHANGES[name]
    run_and_save(tmp_path)
    with caplog.at_level(logging.WARNING):
        resume(tmp_path, SETTINGS | {name: value})
    warnings = warnings_in(caplog)
    assert len(warnings) == 1 and message in warnings[0]


def test_a_checkpoint_without_this_state_continues_with_a_warning(tmp_path, caplog):
    trainer = make_trainer()
    trainer.train(0, 3)
    trainer.iter = 2
    checkpointer(trainer, tmp_path).save("model")
    with caplog.at_level(logging.WARNING):
        resume(tmp_path)
    assert "does not say with which seed" in caplog.text and "iteration 3" in caplog.text


def test_a_new_run_is_not_warned(caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(RunStateHook(SETTINGS)).train(0, 2)
    assert warnings_in(caplog) == []


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale}


@pytest.mark.parametrize(
    ("inner", "trainer", "expected"),
    [
        ({"a": 1}, SimpleNamespace(grad_scaler=Scaler(2)), {"a": 1, "grad_scaler": {"scale": 2}}),
        ({"grad_scaler": 8}, SimpleNamespace(grad_scaler=Scaler(2)), {"grad_scaler": 8}),
        ({"a": 1}, SimpleNamespace(), {"a": 1}),
        ({"grad_scaler": 8}, SimpleNamespace(), {"grad_scaler": 8}),
    ],
)
def test_a_run_with_amp_continues_one_without(inner, trainer, expected):
    state = {"iteration": 3, "_trainer": inner}
    before = {"iteration": 3, "_trainer": dict(inner)}
    assert with_scaler_state(state, trainer) == {"iteration": 3, "_trainer": expected}
    assert state == before


def test_an_optimizer_of_another_model_is_a_users_mistake(tmp_path):
    run_and_save(tmp_path)
    trainer = make_trainer(RunStateHook(SETTINGS))
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(WeightsError, match="state of 'trainer' does not fit this run"):
        checkpointer(trainer, tmp_path).resume_or_load("")
