"""Runs killed or stopped at any moment, or made longer: they end as an undisturbed run does."""

import itertools
import multiprocessing
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import JSONWriter
from helpers import json_lines, key_values
from torch import nn

from s4m_d2.engine import TeacherTrainer, run_config
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED, Stopped
from s4m_d2.report import read_results

from .sameness import assert_same

ITERATIONS = 65
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds"}
MOMENTS = (19, 20, 29, 59, 64)  # of saving, writing, evaluating: each alone, together, at the end


class Model(nn.Module):
    """The loss of a batch tells the batch and the weights."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(1, 1), nn.Linear(1, 1)
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, batch):
        value = torch.tensor([float(batch[0]["file_name"])]).sin()
        return {"loss": self.head(self.backbone(value)).sum() ** 2}


class Toy(TeacherTrainer):
    """TeacherTrainer with a model of four weights; ``act(place)`` is called between any two hooks.

    Attributes:
        seen: (iteration, batch, learning rates) of each step.
    """

    act = staticmethod(lambda place: None)

    def __init__(self, cfg):
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        super().__init__(cfg)
        self.seen = []
        for hook, point in itertools.product(self._hooks, ("after_step", "after_train")):
            setattr(hook, point, self._watched(getattr(hook, point)))

    def _watched(self, call):
        def watched():
            self.act(self.iter)
            call()
            self.act(self.iter)

        return watched

    def run_step(self):
        rates = [group["lr"] for group in self.optimizer.param_groups]
        super().run_step()
        files = [sample["file_name"] for sample in self._trainer._batch]
        self.seen.append((self.iter, files, rates))

    def evaluate(self):
        self.act(self.iter)
        return {"segm": {"AP": self.trained_model.head.weight.item()}}

    def build_writers(self):
        return [JSONWriter(f"{self.cfg.OUTPUT_DIR}/metrics.json")]

    @classmethod
    def build_model(cls, cfg):
        return Model()

    @classmethod
    def build_train_loader(cls, cfg, start_iter=0):
        return ([{"file_name": str(i)}] for i in itertools.count(start_iter))


def config(folder, **changes):
    options = {
        "OUTPUT_DIR": str(folder),
        "MODEL.DEVICE": "cpu",
        "DATASETS.TEST": "('some',)",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
        "SOLVER.WARMUP_ITERS": 5,
        "SOLVER.MAX_ITER": ITERATIONS,
        "SOLVER.CHECKPOINT_PERIOD": 10,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.BACKBONE_MULTIPLIER": 0.1,
        "TEST.EVAL_PERIOD": 15,
    }
    return run_config(load_config("", key_values(options, **changes)))


def train(folder, *, resume=False, act=None, evaluate=None, **changes):
    toy = Toy(config(folder, **changes))
    toy.resume_or_load(resume=resume)
    toy.act, toy.evaluate = act or toy.act, evaluate or toy.evaluate
    toy.train()
    return toy


def logged(folder):
    lines = json_lines(Path(folder, "metrics.json"))
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def final(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped, and what lay in it in different moments."""
    folder = tmp_path_factory.mktemp("whole")
    snapshots = []
    contents = set()

    def snapshot(iteration):
        files = (folder / "run").iterdir()
        content = frozenset((path.name, path.stat().st_mtime_ns) for path in files)
        if iteration in (*MOMENTS, ITERATIONS) and content not in contents:
            contents.add(content)
            snapshots.append(folder / f"{len(snapshots)}")
            shutil.copytree(folder / "run", snapshots[-1])

    train(folder / "run", act=snapshot)
    return folder / "run", snapshots


def assert_as_undisturbed(whole, folder):
    assert logged(folder) == logged(whole)
    assert_same(final(folder), final(whole))


def test_an_undisturbed_run_logs_each_period_and_each_evaluation(whole):
    lines = {line["iteration"]: line for line in logged(whole[0])}
    assert sorted(lines) == [14, 19, 29, 39, 59, 64, 65]
    evaluated = [i for i in sorted(lines) if "segm/AP" in lines[i]]
    assert evaluated == [14, 29, 59, 65]  # two in a period: the last


def test_a_run_killed_at_any_moment_logs_what_an_undisturbed_one_does(whole, tmp_path):
    run, snapshots = whole
    assert len(snapshots) > 10
    for snapshot in snapshots:
        with (snapshot / "metrics.json").open("a") as file:
            file.write('{"iteration": 6')  # half a line
        train(snapshot, resume=True)
        assert_as_undisturbed(run, snapshot)


@pytest.mark.parametrize(
    ("number", "iteration", "saved"),
    [
        (signal.SIGTERM, 29, "model_0000029.pth"),
        (signal.SIGUSR1, 33, "model_0000033.pth"),
        (signal.SIGINT, 64, "model_final.pth"),
        (signal.SIGTERM, 65, "model_final.pth"),
    ],
)
def test_a_run_stopped_by_a_signal_or_an_error_logs_what_an_undisturbed_one_does(
    whole, listening, tmp_path, caplog, number, iteration, saved
):
    """The signal saves after its iteration, within which it came."""

    def stop(now):
        if now == iteration and not stopped:
            stopped.append(now)
            signal.raise_signal(number)

    def fail(now):
        if now == iteration:
            raise OSError("a broken disk")

    stopped = []
    with pytest.raises(Stopped) as ended:
        train(tmp_path, act=stop)
    assert ended.value.code == EXIT_STOPPED == 75
    assert number.name in caplog.text and "--resume" in caplog.text
    assert (tmp_path / "last_checkpoint").read_text() == saved
    with pytest.raises(OSError, match="broken"):
        train(tmp_path, resume=True, act=fail)
    train(tmp_path, resume=True)
    assert_as_undisturbed(whole[0], tmp_path)


@pytest.mark.parametrize("worker_dies", [False, True])
def test_a_signal_ends_an_evaluation_at_once(whole, listening, tmp_path, worker_dies):
    def evaluate():
        try:
            signal.raise_signal(signal.SIGUSR1)
            raise AssertionError("the evaluation went on")
        except BaseException:
            if worker_dies:
                raise RuntimeError("DataLoader worker is killed by signal: User signal 1") from None
            raise

    with pytest.raises(Stopped):
        train(tmp_path, evaluate=evaluate)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000014.pth"
    train(tmp_path, resume=True)
    assert_as_undisturbed(whole[0], tmp_path)


def test_an_iteration_that_fails_is_never_saved_as_complete(listening, tmp_path, monkeypatch):
    """Nor evaluated. Not even if a signal comes in it, and it is the last."""
    forward = Model.forward

    def fail(model, batch):
        if batch[0]["file_name"] == f"{ITERATIONS - 1}":
            signal.raise_signal(signal.SIGTERM)
            raise FloatingPointError("Loss is infinite or NaN")
        return forward(model, batch)

    monkeypatch.setattr(Model, "forward", fail)
    with pytest.raises(FloatingPointError):
        train(tmp_path)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000059.pth"
    assert read_results(str(tmp_path / "results.json"))["iterations"] == 60


def test_other_processes_forked_while_listening_still_end_by_the_signal(listening):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=lambda: (started.set(), time.sleep(60)))
    child.start()
    assert started.wait(30)
    child.terminate()  # as a pool ends its processes
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


def test_what_lies_in_the_folder_of_a_run_that_saved_nothing_is_not_of_the_next(whole, tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "total_loss": 1.0}\n')
    (tmp_path / "results.json").write_text('{"iterations": 15, "segm": {"AP": 1.0}}')
    train(tmp_path)
    assert_as_undisturbed(whole[0], tmp_path)


@pytest.mark.parametrize("schedule", ["WarmupPolyLR", "WarmupMultiStepLR"])
@pytest.mark.parametrize(("start", "before", "after"), [(10, 20, 30), (20, 20, 30), (10, 30, 20)])
def test_a_run_resumed_with_another_length_has_that_lengths_schedule(
    tmp_path, schedule, start, before, after
):
    changes = {"SOLVER__LR_SCHEDULER_NAME": schedule, "SOLVER__STEPS": "(5, 15, 25)"}
    changes |= {"TEST__EVAL_PERIOD": 10}

    def kill(now):
        if now == start + 2:
            raise OSError("killed")

    expected = train(tmp_path / "whole", SOLVER__MAX_ITER=after, **changes)
    if start < before:
        with pytest.raises(OSError, match="killed"):
            train(tmp_path / "run", act=kill, SOLVER__MAX_ITER=before, **changes)
    else:
        train(tmp_path / "run", SOLVER__MAX_ITER=before, **changes)
    toy = train(tmp_path / "run", resume=True, SOLVER__MAX_ITER=after, **changes)
    assert toy.start_iter == start
    assert toy.seen == expected.seen[start:]
    first, second = (final(tmp_path / name)["trainer"]["hooks"] for name in ("run", "whole"))
    assert_same(first["LRScheduler"], second["LRScheduler"])
    lines = ([line["iteration"] for line in logged(tmp_path / name)] for name in ("run", "whole"))
    assert next(lines) == next(lines)


def test_a_run_that_goes_on_past_its_end_is_unfinished_until_the_new_one(tmp_path):
    train(tmp_path, SOLVER__MAX_ITER=25)

    def kill(now):
        assert not (tmp_path / "model_final.pth").exists()
        if now == 27:
            raise OSError("killed")

    with pytest.raises(OSError, match="killed"):
        train(tmp_path, resume=True, act=kill)
    assert train(tmp_path, resume=True).start_iter == 25
    assert {"model_0000024.pth", "model_final.pth"} <= {path.name for path in tmp_path.iterdir()}
    evaluated = [line["iteration"] for line in logged(tmp_path) if "segm/AP" in line]
    assert evaluated == [14, 29, 59, 65]  # the old end's stays
