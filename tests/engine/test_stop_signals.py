"""SIGTERM and SIGUSR1: saved within the iteration, ended with a status of its own, continued."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.engine import SimpleTrainer, default_argument_parser
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from torch.multiprocessing import ProcessExitedException

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.command import launch
from s4m_d2.engine.training.stop_signals import (
    EXIT_STOPPED,
    STOP_SIGNALS,
    StopHook,
    Stopped,
    listen,
)

from . import stopped_ranks
from .stopped_ranks import SIGNALED_ITERATION, WORLD_SIZE, Line

MAX_ITER = 6


@pytest.fixture(autouse=True)
def listening():
    before = listen()
    yield
    listen()  # forgets what was received
    for number, handler in before.items():
        signal.signal(number, handler)


class Toy:
    """A trainer with the hooks that matter; ``act(iteration)`` is called within each step."""

    def __init__(self, folder, act=lambda i: None, evaluate=dict, period=100) -> None:
        self.model = Line(lambda: act(self.trainer.iter))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.5)
        self.trainer = SimpleTrainer(self.model, itertools.repeat(None), optimizer)
        self.checkpointer = S4MCheckpointer(self.model, str(folder), trainer=self.trainer)
        self.saved = []
        save = self.checkpointer.save
        self.checkpointer.save = lambda name, **more: (self.saved.append(name), save(name, **more))
        self.stop = StopHook(self.checkpointer)

        def evaluate_unless_stopping():
            if not self.stop.stopping:
                with self.stop.during_evaluation():
                    return evaluate()

        periodic = PeriodicCheckpointer(self.checkpointer, period)
        evaluation = EvalHook(2, evaluate_unless_stopping)
        self.trainer.register_hooks([periodic, self.stop, evaluation])

    def train(self, resume=False) -> float:
        start = 0
        if resume:
            self.checkpointer.resume_or_load("")
            start = self.trainer.iter + 1
        self.trainer.train(start, MAX_ITER)
        return self.model.weight.item()


def raise_at(iteration, number):
    return lambda i: signal.raise_signal(number) if i == iteration else None


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("iteration", [0, 3])
def test_a_signal_saves_after_its_iteration_and_the_run_goes_on_exactly(
    tmp_path, caplog, number, iteration
):
    expected = Toy(tmp_path / "whole").train()
    toy = Toy(tmp_path, raise_at(iteration, number))
    with pytest.raises(Stopped) as stopped:
        toy.train()
    assert stopped.value.code == EXIT_STOPPED == 75
    assert toy.trainer.iter == iteration
    assert toy.saved == [f"model_{iteration:07d}"]
    assert number.name in caplog.text and "--resume" in caplog.text
    resumed = Toy(tmp_path)
    assert resumed.train(resume=True) == expected
    assert resumed.trainer.start_iter == iteration + 1


@pytest.mark.parametrize("worker_dies", [False, True])
def test_a_signal_ends_an_evaluation_at_once(tmp_path, worker_dies, monkeypatch):
    def evaluate():
        try:
            signal.raise_signal(signal.SIGUSR1)
            raise AssertionError("the evaluation went on")
        except BaseException:
            if worker_dies:
                raise RuntimeError("DataLoader worker is killed by signal: User signal 1") from None
            raise

    toy = Toy(tmp_path, evaluate=evaluate)
    with pytest.raises(Stopped):
        toy.train()
    assert toy.saved == ["model_0000001"]
    assert Toy(tmp_path).train(resume=True) == Toy(tmp_path / "whole").train()


def test_a_failed_iteration_is_never_saved_as_complete(tmp_path):
    """Detectron2 evaluates after a failure in the last iteration; a signal may come then."""

    def fail(iteration):
        if iteration == MAX_ITER - 1:
            raise FloatingPointError("Loss is infinite or NaN")

    def evaluate():
        if toy.trainer.iter == MAX_ITER - 1:
            signal.raise_signal(signal.SIGTERM)

    toy = Toy(tmp_path, fail, evaluate)
    with pytest.raises(Stopped):
        toy.train()
    assert toy.saved == []


def test_other_processes_forked_while_listening_still_end_by_the_signal():
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=lambda: (started.set(), time.sleep(60)))
    child.start()
    assert started.wait(30)
    child.terminate()  # as a pool ends its processes
    child.join(30)
    assert child.exitcode == -signal.SIGTERM


@pytest.mark.slow
def test_all_ranks_stop_together_when_one_gets_a_signal(tmp_path):
    result = subprocess.run(
        [sys.executable, stopped_ranks.__file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == EXIT_STOPPED, result.stderr
    assert "Traceback" not in result.stderr
    for rank in range(WORLD_SIZE):
        assert (tmp_path / f"rank_{rank}.txt").read_text() == str(SIGNALED_ITERATION)
    assert [path.stem for path in tmp_path.glob("*.pth")] == [f"model_{SIGNALED_ITERATION:07d}"]


def test_the_launcher_hands_signals_on_and_ends_as_the_ranks_do(monkeypatch):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def wait_for_a_signal():
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        ready.set()
        number = signal.sigwait(STOP_SIGNALS)
        os._exit(EXIT_STOPPED if number == signal.SIGUSR1 else 1)

    rank = context.Process(target=wait_for_a_signal)

    def two_ranks(*args, **options):
        rank.start()
        ready.wait()
        signal.raise_signal(signal.SIGUSR1)
        rank.join()
        raise ProcessExitedException("", 0, rank.pid, exit_code=rank.exitcode)

    monkeypatch.setattr(launch, "launch_here", two_ranks)
    with pytest.raises(SystemExit) as ended:
        launch.launch(None, default_argument_parser().parse_args(["--num-gpus", "2"]))
    assert ended.value.code == EXIT_STOPPED
