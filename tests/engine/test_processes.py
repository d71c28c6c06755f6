"""Two processes with half of each batch do what one process does with all of it."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import default_argument_parser
from helpers import json_lines

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, stage_config
from s4m_d2.engine.command.launch import launch
from s4m_d2.engine.labeling.quality import RECORDS

from .conftest import make_config
from .process_runs import (
    BURN_IN,
    CONFIG,
    EMPTY_FROM,
    ITERATIONS,
    LABELED,
    MISTAKE,
    UNLABELED,
    result_path,
    train_all,
    train_all_then_fail,
)

WORLD = 2
LAYERS = {"teacher": 1, "student": 2}  # with 1 some parameters have no gradient
FEW = 3  # iterations before which no step has changed what is compared by more than rounding
# Where rounding moves a pixel of a pseudo-label over a threshold, its loss makes a small step, and
# the weights, and with them all losses, follow other roundings from there.
TOLERANCE, TOLERANCE_LATER, TOLERANCE_OF_PSEUDO_LABELS = 1e-4, 1e-2, 1e-2
# Of a parameter's change, in all iterations.
OF_CHANGE = {"teacher": 1e-3, "student": 2e-2}


def make_configs(folder):
    """The config of each run's stage."""
    layers = "MODEL.MASK_FORMER.DEC_LAYERS"
    cfgs = {name: make_config(folder / name, **CONFIG, **{layers: LAYERS[name]}) for name in LAYERS}
    return {name: stage_config(cfg, name) for name, cfg in cfgs.items()}


@contextlib.contextmanager
def stderr_into(path):
    """What this process and those that it starts write to stderr."""
    shown = os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(shown, 2)
            os.close(shown)


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """(name, processes) → what each process saw."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(small_data))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        cfgs = make_configs(folder / "one")
        untrained = S4MTrainer.build_model(cfgs["student"])
        S4MCheckpointer(untrained, str(folder)).save("untrained")
        weights = {"student": str(folder / "untrained.pth")}
        train_all(cfgs, weights, str(folder))
        args = default_argument_parser().parse_args(["--num-gpus", str(WORLD), "--dist-url=auto"])
        cfgs = make_configs(folder / "two")
        vars(args).update(cfgs=cfgs, teachers=weights, folder=str(folder))
        with stderr_into(folder / "stderr.txt"), pytest.raises(SystemExit) as ended:
            launch(train_all_then_fail, args)

    def seen(name, world_size):
        paths = [result_path(name, str(folder), rank, world_size) for rank in range(world_size)]
        return [SimpleNamespace(**torch.load(path, weights_only=True)) for path in paths]

    seen.folder = folder
    seen.exit_code = ended.value.code
    seen.stderr = (folder / "stderr.txt").read_text()
    return seen


@pytest.mark.parametrize("name", ITERATIONS)
def test_the_processes_share_the_images_of_each_iteration(runs, name):
    [whole], parts = runs(name, 1), runs(name, WORLD)
    for stream, (size, expected) in enumerate(
        zip((LABELED, UNLABELED), whole.positions, strict=False)
    ):
        shares = zip(*(part.positions[stream] for part in parts), strict=True)
        assert [sorted(sum(share, [])) for share in shares] == expected
        assert expected == [list(range(i * size, (i + 1) * size)) for i in range(ITERATIONS[name])]


@pytest.mark.parametrize("name", ITERATIONS)
def test_losses_follow_those_of_one_process(runs, name):
    """The class loss too, which Mask2Former would take of each process alone."""
    [whole], (first, _) = runs(name, 1), runs(name, WORLD)
    assert len(first.losses) == len(whole.losses) == ITERATIONS[name]
    for iteration, (ours, expected) in enumerate(zip(first.losses, whole.losses, strict=True)):
        exact = name == "teacher" or iteration < FEW
        assert ours.keys() == expected.keys()
        labeled = [loss for loss in expected if loss.startswith("loss_")]
        assert len(labeled) >= 3 * LAYERS[name]
        for loss in expected:
            rel = TOLERANCE if exact else TOLERANCE_LATER
            rel = rel if loss in labeled else TOLERANCE_OF_PSEUDO_LABELS
            assert ours[loss] == pytest.approx(expected[loss], rel=rel, abs=1e-6), loss
    if name == "student":
        assert {"loss_ce", "unsup/loss_mask_0"} <= whole.losses[0].keys()
        assert all(losses["unsup/loss_mask"] > 0 for losses in whole.losses)
    else:
        assert all(losses["loss_sd"] > 0 for losses in whole.losses)


def test_pseudo_labels_are_measured_on_the_same_images_by_all_processes_together(runs):
    """With the teacher of stage 1 the result is the same, but for the order of its sums."""
    alone, together = (
        json_lines(runs.folder / world / "student/student" / RECORDS) for world in ("one", "two")
    )
    assert [entry["iteration"] for entry in together] == [1, 3]
    assert [entry["images"] for entry in alone + together] == [2] * 4
    assert together[0]["after"]["overall"]["pseudo_labels"] > 0
    for step in ("before", "after"):
        measured, expected = (entries[0][step]["overall"] for entries in (together, alone))
        for key, value in expected.items():  # None: nothing to measure
            same = None if value is None else pytest.approx(value, rel=1e-9)
            assert measured[key] == same, key


@pytest.mark.parametrize("name", ITERATIONS)
def test_weights_follow_those_of_one_process(runs, name):
    """Each parameter, measured by what training has changed it by."""
    [whole], parts = runs(name, 1), runs(name, WORLD)
    for key, expected in whole.after.items():
        change = (expected - whole.before[key]).abs().max()
        for part in parts:
            assert torch.equal(part.before[key], whole.before[key])
            error = (part.after[key] - expected).abs().max()
            assert error <= OF_CHANGE[name] * change + 1e-6, key


def test_teacher_and_student_are_the_same_on_every_process_after_every_step(runs):
    first, second = runs("student", WORLD)
    assert first.teachers == second.teachers
    assert first.students == second.students
    assert len(set(first.students)) == len(first.students) == ITERATIONS["student"]
    assert len(set(first.teachers)) == ITERATIONS["student"] - BURN_IN + 1  # frozen, then moving


def test_class_thresholds_follow_the_images_of_all_processes(runs):
    [whole], (first, second) = runs("student", 1), runs("student", WORLD)
    assert first.thresholds == second.thresholds
    for ours, expected in zip(first.thresholds, whole.thresholds, strict=True):
        assert ours == pytest.approx(expected, rel=1e-3)
    assert len({tuple(of_step) for of_step in whole.thresholds}) > 1
    assert min(whole.thresholds[-1]) < max(whole.thresholds[-1]) == pytest.approx(0.1)


def test_processes_follow_although_the_second_has_no_labels_or_pseudo_labels_in_the_end(runs):
    """What the two tests above say of the student's last iterations too."""
    [whole], (first, second) = runs("student", 1), runs("student", WORLD)
    assert min(first.pseudo_labels) > 0 and min(second.pseudo_labels[:EMPTY_FROM]) > 0
    assert not any(second.pseudo_labels[EMPTY_FROM:])
    halves = first.pseudo_labels[EMPTY_FROM:]
    for one, half in zip(whole.pseudo_labels[EMPTY_FROM:], halves, strict=True):
        assert one == pytest.approx(half / WORLD)


def test_the_failure_of_one_process_ends_the_other_and_is_shown(runs):
    assert runs.exit_code == 1
    assert f"[rank 1] DatasetError: {MISTAKE}" in runs.stderr
