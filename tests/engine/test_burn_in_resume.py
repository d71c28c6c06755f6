"""Burn-in and EMA in real stage-2 runs: exact in every iteration, through a stop at any of them."""

import json
import os
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from torch import Tensor

from s4m_d2.engine import S4MCheckpointer, S4MTrainer
from s4m_d2.engine.training.build import build_unlabeled_loader

from .sameness import assert_same
from .test_trainer import BURN_IN, ITERATIONS, Killed, configs  # noqa: F401
from .test_trainer import final_state as saved
from .test_trainer import run as run_trainer

DECAY = 0.75
FORWARDS = 2  # of the student in an iteration: labeled and unlabeled images
TRACKED_AT_STAGE_ONE = 1000
QUERIES = "sem_seg_head.predictor.query_feat.weight"

State = dict[str, Tensor]


def state_of(model) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Watch(HookBase):
    """Remembers what the teacher does in a run."""

    def __init__(self, trainer: S4MTrainer) -> None:
        # By iteration: the models when the teacher labeled, the batch, and its predictions.
        self.steps: dict[int, SimpleNamespace] = {}
        teacher = trainer.teacher.model
        predict_queries = teacher.predict_queries

        def watched(batch):
            assert trainer.iter not in self.steps, "the teacher labeled twice"
            models = {"student": self.updated, "teacher": state_of(teacher)}
            step = SimpleNamespace(batch=batch, predictions=predict_queries(batch), **models)
            self.steps[trainer.iter] = step
            return step.predictions

        teacher.predict_queries = watched
        trainer.register_hooks([self])

    def before_train(self) -> None:
        self.updated = state_of(self.trainer.trained_model)  # by the iteration before

    def after_step(self) -> None:
        self.before_train()
        latest = self.trainer.storage.latest()
        self.steps[self.trainer.iter].phase = latest["teacher/phase"][0]


@pytest.fixture(scope="module")
def make_config(configs):  # noqa: F811
    """(folder, overrides) → config of stage 2, without evaluation and without SAM."""
    # Refinement is tested elsewhere, and slow.
    base = {"DATASETS__TEST": "()", "S4M__REFINE__ENABLED": False, "S4M__EMA_DECAY": DECAY}
    return lambda folder, **changes: configs("student", folder, **base | changes)


@pytest.fixture(scope="module")
def stage_one(make_config) -> str:
    """An untrained stage-1 checkpoint, with what longer training would have counted."""
    cfg = make_config("stage_one", SEED=5)
    model = S4MTrainer.build_model(cfg)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(TRACKED_AT_STAGE_ONE)
        elif name.endswith("running_mean"):
            value.fill_(0.25)
    S4MCheckpointer(model, cfg.OUTPUT_DIR).save("model_final")
    return os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


@pytest.fixture(scope="module")
def run(make_config, stage_one):
    """(folder, overrides) → the trainer of a run that ended, and what the teacher did."""

    def run(folder, *, resume=False, kill_after=None, **changes):
        trainer = S4MTrainer(make_config(folder, **changes), stage_one)
        watch = Watch(trainer)
        with nullcontext() if kill_after is None else pytest.raises(Killed):
            run_trainer(trainer, resume, kill_after)
        return trainer, watch.steps

    return run


@pytest.fixture(scope="module")
def whole(run):
    """burn_in → a run that nothing stopped."""
    return cache(lambda burn_in: run(f"whole_{burn_in}", S4M__BURN_IN=burn_in))


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def teacher_by_hand(stage_one: State, students: list[State], burn_in: int) -> State:
    """The teacher of the last of the iterations before which the students were these.

    In double precision: before burn-in ends stage 1's; at its end the student s_b; then
    d·teacher + (1 - d)·student, and whatever counts is the student's.
    """
    teacher = {name: value.clone() for name, value in stage_one.items()}
    for iteration, student in enumerate(students):
        for name, value in student.items():
            if iteration == burn_in or (iteration > burn_in and not value.is_floating_point()):
                teacher[name] = value.clone()
            elif iteration > burn_in:
                teacher[name] = DECAY * teacher[name].double() + (1 - DECAY) * value.double()
    return teacher


@pytest.mark.parametrize("burn_in", [0, BURN_IN])
def test_the_teacher_of_each_iteration_is_the_one_computed_by_hand(whole, stage_one, burn_in):
    _, steps = whole(burn_in)
    start = load(stage_one)["model"]
    for iteration, step in steps.items():
        students = [steps[i].student for i in range(iteration + 1)]
        expected = teacher_by_hand(start, students, burn_in)
        assert step.teacher.keys() == expected.keys()
        for name, value in step.teacher.items():
            if iteration <= burn_in or not value.is_floating_point():
                assert torch.equal(value, expected[name]), (iteration, name)
            else:
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-8)
        tracked = {int(v) for name, v in step.teacher.items() if name.endswith("_tracked")}
        assert tracked == {TRACKED_AT_STAGE_ONE if iteration < burn_in else FORWARDS * iteration}
        assert step.phase == (iteration >= burn_in) + (iteration > burn_in)


def test_no_model_here_is_like_another(whole, stage_one):
    """Otherwise the other tests could not tell a teacher from one that came too late."""
    trainer, steps = whole(BURN_IN)
    assert_same(steps[0].student, state_of(S4MTrainer.build_model(trainer.cfg)))
    students = [steps[i].student for i in range(ITERATIONS)]
    states = [load(stage_one)["model"], *students, saved(trainer)["model"]]
    for name in ("backbone.stem.conv1.norm.running_mean", QUERIES):
        for first, second in zip(states, states[1:], strict=False):
            difference = (first[name] - second[name]).abs().max()
            assert difference > 2e-5 * first[name].abs().max()


@pytest.mark.parametrize("iteration", [BURN_IN - 1, BURN_IN, BURN_IN + 1])
def test_the_teacher_labels_the_batch_of_the_iteration_with_these_weights(whole, iteration):
    trainer, steps = whole(BURN_IN)
    step = steps[iteration]
    batch = next(iter(build_unlabeled_loader(trainer.cfg, start_iter=iteration)))
    weak = [{**sample, "image": sample["image_weak"]} for sample in batch]
    assert [s["file_name"] for s in weak] == [s["file_name"] for s in step.batch]
    model = S4MTrainer.build_model(trainer.cfg).eval().requires_grad_(False)
    model.load_state_dict(step.teacher)
    assert_same(step.predictions, model.predict_queries(weak))


@pytest.mark.parametrize(
    ("burn_in", "start"),
    [(BURN_IN, BURN_IN - 1), (BURN_IN, BURN_IN), (BURN_IN, BURN_IN + 1), (0, 1)],
)
def test_a_run_stopped_before_an_iteration_goes_on_as_if_it_was_not(
    run, whole, tmp_path, burn_in, start
):
    trainer, steps = whole(burn_in)
    changes = {"S4M__BURN_IN": burn_in, "SOLVER__CHECKPOINT_PERIOD": start}
    _, before = run(tmp_path, kill_after=start - 1, **changes)
    torch.manual_seed(99)  # whatever the new process drew before
    resumed, after = run(tmp_path, resume=True, **changes)
    assert sorted(before) == list(range(start)) and sorted(after) == list(range(start, ITERATIONS))
    for iteration, step in (before | after).items():
        assert_same(vars(step), vars(steps[iteration]), f"iteration {iteration}")
    first, second = saved(trainer), saved(resumed)
    assert_same(first["model"], second["model"], "student")
    for part in ("hooks", "_trainer"):
        assert_same(first["trainer"][part], second["trainer"][part], part)


@pytest.mark.parametrize("burn_in", [1, 2])
def test_a_teacher_that_stays_frozen_is_stage_ones_and_not_evaluated(
    run, stage_one, tmp_path, burn_in
):
    """In a run of two iterations; continuing it once it is finished evaluates again."""
    for resume in (False, True):
        trainer, steps = run(tmp_path, resume=resume, SOLVER__MAX_ITER=2, S4M__BURN_IN=burn_in)
        assert sorted(steps) == ([] if resume else [0, 1])
        with open(os.path.join(trainer.cfg.OUTPUT_DIR, "results.json")) as file:
            assert ("teacher" in json.load(file)) == (burn_in < 2)
        if burn_in >= 2:
            assert_same(state_of(trainer.teacher.model), dict(load(stage_one)["model"]))
