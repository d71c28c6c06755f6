"""Two processes with half of each batch do what one process does with all of it."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import launch

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, run_config, stage_config
from s4m_d2.engine.config_file import load_config

from .conftest import ROOT, SMALL
from .process_runs import BATCH, COMMON, RUNS, result_path, train_all

FOLLOWED = ("teacher", "student", "one-sided")
WORLD = 2


def make_configs(folder):
    """The config of each run's stage."""
    cfgs = {}
    for name, run in RUNS.items():
        options = SMALL | COMMON | run.changes
        options |= {
            "OUTPUT_DIR": str(folder / name),
            "SOLVER.MAX_ITER": run.iterations,
            "S4M.TEACHER.MAX_ITER": run.iterations,
        }
        path = str(ROOT / "configs" / "toyscapes_10pct.yaml")
        pairs = [str(item) for pair in options.items() for item in pair]
        cfgs[name] = stage_config(run_config(load_config(path, pairs)), run.stage)
    return cfgs


def untrained_teacher(cfg, path):
    model = S4MTrainer.build_model(cfg)
    S4MCheckpointer(model, str(path.parent)).save(path.stem)
    return str(path)


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """(name, processes) → what each process saw."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(small_data))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        weights = {}
        for name, cfg in make_configs(folder / "one").items():
            if RUNS[name].stage == "student":
                weights[name] = untrained_teacher(cfg, folder / f"{name}.pth")
        train_all(make_configs(folder / "one"), weights, str(folder))
        cfgs = make_configs(folder / "two")
        launch(train_all, WORLD, dist_url="auto", args=(cfgs, weights, str(folder)))

    def seen(name, world_size):
        paths = [result_path(name, str(folder), rank, world_size) for rank in range(world_size)]
        return [SimpleNamespace(**torch.load(path, weights_only=True)) for path in paths]

    return seen


@pytest.mark.parametrize("name", RUNS)
def test_the_processes_share_the_images_of_each_iteration(runs, name):
    [whole], parts = runs(name, 1), runs(name, WORLD)
    for stream, expected in enumerate(whole.positions):
        shares = zip(*(part.positions[stream] for part in parts), strict=True)
        assert [sorted(sum(share, [])) for share in shares] == expected
        assert expected[:3] == [list(range(i * BATCH, (i + 1) * BATCH)) for i in range(3)]


@pytest.mark.parametrize("name", FOLLOWED)
def test_losses_follow_those_of_one_process(runs, name):
    """The class loss too, which Mask2Former would take of each process alone."""
    [whole], (first, _) = runs(name, 1), runs(name, WORLD)
    assert len(first.losses) == len(whole.losses) == RUNS[name].iterations
    for ours, expected in zip(first.losses, whole.losses, strict=True):
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if RUNS[name].stage == "student":
        assert {"loss_ce", "unsup/loss_mask_0"} <= whole.losses[0].keys()
        assert all(losses["unsup/loss_mask"] > 0 for losses in whole.losses)
    else:
        assert all(losses["loss_sd"] > 0 for losses in whole.losses)


@pytest.mark.parametrize("name", FOLLOWED)
def test_weights_follow_those_of_one_process(runs, name):
    """Each parameter, to a thousandth of what training has changed it by."""
    [whole], parts = runs(name, 1), runs(name, WORLD)
    for key, expected in whole.after.items():
        change = (expected - whole.before[key]).abs().max()
        for part in parts:
            assert torch.equal(part.before[key], whole.before[key])
            error = (part.after[key] - expected).abs().max()
            assert error <= 1e-3 * change + 1e-7, key


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.stage == "student"])
def test_teacher_and_student_are_the_same_on_every_process_after_every_step(runs, name):
    """With the running averages of a plain BatchNorm too."""
    first, second = runs(name, WORLD)
    assert first.teachers == second.teachers
    assert first.students == second.students
    assert len(set(first.students)) == len(first.students) == RUNS[name].iterations
    burn_in = COMMON["S4M.BURN_IN"]
    assert len(set(first.teachers)) == RUNS[name].iterations - burn_in + 1  # frozen, then moving


def test_every_process_has_the_same_labeled_subset(runs):
    [whole], (first, second) = runs("student", 1), runs("student", WORLD)
    assert len(whole.labeled_set) == 3
    assert first.labeled_set == second.labeled_set == whole.labeled_set
    for part in (first, second):  # 20 images each
        assert part.labeled_files == sorted(whole.labeled_set)


def test_the_one_sided_run_is_one_sided(runs):
    [whole], (first, second) = runs("one-sided", 1), runs("one-sided", WORLD)
    assert second.pseudo_labels[0] > 0 and not any(second.pseudo_labels[1:])
    assert min(first.pseudo_labels) > 0
    assert whole.pseudo_labels[1] == pytest.approx(first.pseudo_labels[1] / WORLD)
