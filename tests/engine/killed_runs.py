"""Starts train_net.py in processes of its own, kills them at chosen moments, compares results."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import timm  # noqa: F401 (once, for all processes)
import torch

import s4m_d2.engine.command.run  # noqa: F401

from .conftest import ROOT

TRAIN_NET = str(ROOT / "train_net.py")
POLL = 0.001  # seconds
LIMIT = 240.0  # seconds; a run takes a few, more where many share the machine
STAGES = ("teacher", "student", "finetune")


class Run:
    """A running train_net.py: a fork of this process, which has done the imports."""

    def __init__(self, arguments, log: Path) -> None:
        self._log = log
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_train_net, args=(arguments, str(log)))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status; negative: the signal that ended it; None: it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        end = time.monotonic() + LIMIT
        while self.status is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"train_net.py does not end:\n{self.log()}")
            time.sleep(POLL)
        return self.status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def log(self) -> str:
        return self._log.read_text()


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
    end = time.monotonic() + seconds
    while time.monotonic() < end and run.status is None:
        time.sleep(POLL)
    return _kill(run)


def kill_while_it_writes(run: Run, output: Path, nth: int) -> bool:
    """Kill a run in the middle of the nth checkpoint that it is seen writing; False: it ended."""
    seen = set(half_written(output))  # older ones
    left = nth
    while run.status is None:
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
    if run.status is None:
        run.kill()
    return run.wait() == -signal.SIGKILL


def final_states(output: Path) -> dict[str, dict]:
    """All that the stages saved at their ends."""
    paths = {stage: output / stage / "model_final.pth" for stage in STAGES}
    return {stage: torch.load(path, weights_only=True) for stage, path in paths.items()}
