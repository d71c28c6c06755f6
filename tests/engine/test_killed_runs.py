"""Runs of all stages, killed or stopped from outside and continued: the same final weights."""

import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import timm  # noqa: F401 (once, for all processes)
import torch
from helpers import QUICKSTART, ROOT, key_values

import s4m_d2.engine.command.run  # noqa: F401
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED

from .conftest import SMALL
from .own_runs import LIGHT
from .sameness import assert_same

TRAIN_NET = str(ROOT / "train_net.py")
POLL = 0.001  # seconds
LIMIT = 240.0  # seconds; a run takes a few, more where many share the machine
STAGES = ("teacher", "student", "finetune")
ITERATIONS, BURN_IN, KEEP = 3, 1, 2
OPTIONS = SMALL | {
    **LIGHT,
    "DATALOADER.NUM_WORKERS": 1,  # for each of the two loaders
    "DATASETS.TEST": "()",
    "INPUT.TILE.SIZE": 48,
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.CHECKPOINT_KEEP": KEEP,
    "S4M.TEACHER.MAX_ITER": ITERATIONS,
    "S4M.FINETUNE.MAX_ITER": ITERATIONS,
    "S4M.BURN_IN": BURN_IN,
    "S4M.EMA_DECAY": 0.5,
}


class Run(multiprocessing.get_context("fork").Process):
    """A running train_net.py: a fork of this process, which has done the imports."""

    def __init__(self, arguments, log: Path) -> None:
        super().__init__(target=_train_net, args=(arguments, str(log)))
        self.log = log.read_text
        self.start()

    def wait(self) -> int:
        """Exit status; negative: the signal that ended it."""
        self.join(LIMIT)
        if self.exitcode is None:
            self.kill()
            raise AssertionError(f"train_net.py does not end:\n{self.log()}")
        return self.exitcode


def _train_net(arguments, log) -> None:
    os.setsid()
    file = open(log, "a", buffering=1)
    for handle in (1, 2):
        os.dup2(file.fileno(), handle)
    sys.stdout = sys.stderr = file  # not pytest's
    sys.argv = [TRAIN_NET, *arguments]
    runpy.run_path(TRAIN_NET, run_name="__main__")


def half_written(output: Path) -> list[Path]:
    """Checkpoints that a process is writing, or was when it was killed."""
    return [path for stage in STAGES for path in (output / stage).glob(".model_*.tmp")]


def kill_after(run: Run, seconds: float) -> bool:
    """Kill a run after so much time; False: it had ended."""
    run.join(seconds)
    return _kill(run)


def kill_while_it_writes(run: Run, output: Path, nth: int) -> bool:
    """Kill a run in the middle of the nth checkpoint that it is seen writing; False: it ended."""
    seen = set(half_written(output))  # older ones
    left = nth
    while run.exitcode is None:
        new = [path for path in half_written(output) if path not in seen]
        seen.update(new)
        left -= len(new)
        if left <= 0 and new:
            os.kill(run.pid, signal.SIGSTOP)
            if any(path.exists() for path in new):
                return _kill(run)
            os.kill(run.pid, signal.SIGCONT)  # too late: the next one
        time.sleep(POLL / 4)
    return False


def _kill(run: Run) -> bool:
    run.kill()
    return run.wait() == -signal.SIGKILL


def final_states(output: Path) -> dict[str, dict]:
    """All that the stages saved at their ends."""
    paths = {stage: output / stage / "model_final.pth" for stage in STAGES}
    return {stage: torch.load(path, weights_only=True) for stage, path in paths.items()}


def start(output, *flags) -> Run:
    output.mkdir(exist_ok=True)
    words = ["--config-file", QUICKSTART, *flags, *key_values(OPTIONS, OUTPUT_DIR=output)]
    return Run(words, output / "stdout.txt")


@pytest.fixture(scope="module", autouse=True)
def data(small_data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(small_data))
        yield


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The output of a run that nothing stopped, and the seconds that it took."""
    output = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    run = start(output)
    assert run.wait() == 0, run.log()
    return output, time.monotonic() - begin


def assert_same_end(whole, output):
    assert_same(final_states(whole), final_states(output))
    for stage in STAGES:
        numbered = {f"model_{i:07d}.pth" for i in range(ITERATIONS - KEEP, ITERATIONS)}
        found = {path.name for path in (output / stage).glob("*.pth")}
        assert found == numbered | {"model_final.pth"}
    assert half_written(output) == []


@pytest.mark.parametrize(
    "kills", [2, pytest.param(24, marks=(pytest.mark.slow, pytest.mark.timeout(3600)))]
)
def test_a_run_killed_at_random_moments_ends_as_if_it_was_not(whole, tmp_path, kills):
    """Every other kill hits a checkpoint that is half written, in any stage."""
    expected, seconds = whole
    rng = random.Random(kills)
    in_the_middle = 0
    output, rounds, killed = tmp_path / "run_0", 0, 0
    while killed < kills:
        run = start(output, "--resume")
        if killed % 2 == 0:
            hit = kill_while_it_writes(run, output, nth=rng.randint(1, ITERATIONS))
            in_the_middle += hit
        else:
            hit = kill_after(run, rng.uniform(0, seconds))
        killed += hit
        if not hit:  # it ended before: the next round
            assert run.exitcode == 0, run.log()
            assert_same_end(expected, output)
            shutil.rmtree(output)
            rounds += 1
            output = tmp_path / f"run_{rounds}"
    assert in_the_middle == (kills + 1) // 2
    last = start(output, "--resume")
    assert last.wait() == 0, last.log()
    assert_same_end(expected, output)


def wait_for(run, path):
    while not path.exists():
        assert run.exitcode is None, run.log()
        time.sleep(POLL)


def newest(folder):
    name = (folder / "last_checkpoint").read_text()
    return name, torch.load(folder / name, weights_only=True)["iteration"]


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_and_ends_the_run(whole, tmp_path):
    """To loading processes as well, as Slurm does."""
    output = tmp_path / "run"
    run = start(output)
    wait_for(run, output / "student" / "last_checkpoint")
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait() == EXIT_STOPPED, run.log()
    assert "Traceback" not in run.log()
    assert re.search("Stopped by SIGTERM.*--resume", run.log())
    name, iteration = newest(output / "student")
    assert name in ("model_final.pth", f"model_{iteration:07d}.pth")

    resumed = start(output, "--resume")
    assert resumed.wait() == 0, resumed.log()
    assert_same_end(whole[0], output)


@pytest.mark.slow
def test_a_damaged_result_of_stage_one_is_made_again(whole, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    damaged, kept, _ = (output / stage / "model_final.pth" for stage in STAGES)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    os.utime(kept, ns=(1, 1))
    run = start(output, "--resume")
    assert run.wait() == 0, run.log()
    assert_same_end(whole[0], output)
    assert kept.stat().st_mtime_ns == 1  # what is finished stays as it is
