"""Runs of all stages, killed or stopped from outside and continued: the same final weights."""

import multiprocessing
import os
import random
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


def end_while_it_writes(run: Run, output: Path, nth: int, number: int) -> bool:
    """Send a signal in the middle of the nth checkpoint that it is seen writing; False: it ended.

    SIGKILL to the run; SIGTERM to its loading processes as well, as Slurm does.
    """
    seen = set(half_written(output))  # older ones
    left = nth
    while run.exitcode is None:
        new = [path for path in half_written(output) if path not in seen]
        seen.update(new)
        left -= len(new)
        if left <= 0 and new and number == signal.SIGTERM:
            os.killpg(run.pid, number)
            return run.wait() == EXIT_STOPPED
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
    "ends", [2, pytest.param(24, marks=(pytest.mark.slow, pytest.mark.timeout(3600)))]
)
def test_a_run_killed_or_stopped_at_random_moments_ends_as_if_it_was_not(whole, tmp_path, ends):
    """Two of three ends come while a checkpoint is half written, in any stage."""
    expected, seconds = whole
    rng = random.Random(ends)
    output, rounds, ended = tmp_path / "run_0", 0, 0
    while ended < ends:
        run = start(output, "--resume")
        if ended % 3 == 2:
            hit = kill_after(run, rng.uniform(0, seconds))
        else:
            number = (signal.SIGKILL, signal.SIGTERM)[ended % 3]
            hit = end_while_it_writes(run, output, rng.randint(1, ITERATIONS), number)
        ended += hit
        if not hit:  # it had ended: the next round
            assert run.exitcode == 0, run.log()
            assert_same_end(expected, output)
            shutil.rmtree(output)
            rounds += 1
            output = tmp_path / f"run_{rounds}"
    last = start(output, "--resume")
    assert last.wait() == 0, last.log()
    assert_same_end(expected, output)


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
