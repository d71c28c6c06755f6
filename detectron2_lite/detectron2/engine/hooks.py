"""Common hooks of a training run."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from torch.optim.lr_scheduler import LRScheduler as _LRScheduler

from .train_loop import HookBase

__all__ = ["EvalHook", "IterationTimer", "LRScheduler", "PeriodicCheckpointer", "PeriodicWriter"]


class IterationTimer(HookBase):
    """Puts the scalar "time", seconds of an iteration without later hooks; goes first.

    The first ``warmup_iter`` - 1 iterations have none.
    """

    def __init__(self, warmup_iter: int = 3):
        self._warmup_iter = warmup_iter
        self._start_time = self._step_start = time.perf_counter()

    def before_train(self) -> None:
        self._start_time = time.perf_counter()

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        if self.trainer.iter - self.trainer.start_iter + 1 >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=seconds)

    def after_train(self) -> None:
        total = datetime.timedelta(seconds=int(time.perf_counter() - self._start_time))
        logging.getLogger(__name__).info(f"Total training time: {total}")


class PeriodicWriter(HookBase):
    """Calls the writers every ``period`` iterations and at the end, then closes them."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20):
        assert all(isinstance(writer, EventWriter) for writer in writers), writers
        self._writers, self._period = writers, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        for writer in self._writers:
            writer.write()  # other hooks may have put scalars after training
            writer.close()


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """fvcore's checkpointer as a hook: every ``period`` iterations and after the last one."""

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)


class LRScheduler(HookBase):
    """Puts the scalar "lr", that of the group with most tensors, and steps the scheduler after
    each iteration; saves its state. What is not given is the trainer's.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None = None, scheduler: _LRScheduler | None = None
    ):
        self._optimizer, self._scheduler = optimizer, scheduler

    @property
    def scheduler(self) -> _LRScheduler:
        return self._scheduler or self.trainer.scheduler

    def after_step(self) -> None:
        groups = (self._optimizer or self.trainer.optimizer).param_groups
        lr = max(groups, key=lambda group: len(group["params"]))["lr"]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.scheduler.load_state_dict(state_dict)


class EvalHook(HookBase):
    """Evaluates every ``eval_period`` iterations (0: never) and, if asked, after training.

    ``eval_function`` returns nothing, or a nested dict of numbers, put as "task/metric". All
    processes or none have this hook, because it ends with a barrier.
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], Any], eval_after_train: bool = True
    ):
        self._period, self._func, self._at_end = eval_period, eval_function, eval_after_train

    def _do_eval(self) -> None:
        if results := self._func():
            assert isinstance(results, dict), f"eval_function must return a dict, got {results!r}"
            scalars = flatten_results_dict(results)
            try:
                scalars = {name: float(value) for name, value in scalars.items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f"[EvalHook] not a nested dict of numbers: {scalars}") from error
            self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        comm.synchronize()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._do_eval()

    def after_train(self) -> None:
        if self._at_end and self.trainer.iter + 1 >= self.trainer.max_iter:  # not after a failure
            self._do_eval()
        self._func = None  # it may hold the trainer
