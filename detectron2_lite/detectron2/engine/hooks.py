"""Common hooks of a training run."""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer
from torch.optim.lr_scheduler import LRScheduler as _LRScheduler

from .train_loop import HookBase

__all__ = ["EvalHook", "IterationTimer", "LRScheduler", "PeriodicCheckpointer", "PeriodicWriter"]


class IterationTimer(HookBase):
    """Puts the scalar "time", seconds of an iteration without later hooks; goes first.

    The first ``warmup_iter`` iterations do not count in the summary after training.
    """

    def __init__(self, warmup_iter: int = 3):
        self._warmup_iter = warmup_iter
        self._start_time = time.perf_counter()
        self._step_timer, self._total_timer = Timer(), Timer()

    def before_train(self) -> None:
        self._start_time = time.perf_counter()
        self._total_timer.reset()
        self._total_timer.pause()

    def before_step(self) -> None:
        self._step_timer.reset()
        self._total_timer.resume()

    def after_step(self) -> None:
        done = self.trainer.storage.iter - self.trainer.start_iter + 1
        if done >= self._warmup_iter:
            self.trainer.storage.put_scalars(time=self._step_timer.seconds())
        else:
            self._start_time = time.perf_counter()
            self._total_timer.reset()
        self._total_timer.pause()

    def after_train(self) -> None:
        logger = logging.getLogger(__name__)
        in_steps = self._total_timer.seconds()
        total = datetime.timedelta(seconds=int(time.perf_counter() - self._start_time))
        count = self.trainer.storage.iter + 1 - self.trainer.start_iter - self._warmup_iter
        if count > 0:
            logger.info(f"Overall speed: {count} iterations ({in_steps / count:.4f} s / it)")
        logger.info(f"Total training time: {total}, {int(in_steps)} s of it outside of hooks")


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
    """Puts the scalar "lr" and steps the scheduler after each iteration; saves its state.

    What is not given is the trainer's ``optimizer`` and ``scheduler``. A fvcore
    ``ParamScheduler`` multiplies the learning rates the optimizer has when training starts.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer | None = None,
        scheduler: _LRScheduler | ParamScheduler | None = None,
    ):
        self._optimizer, self._scheduler = optimizer, scheduler

    @property
    def scheduler(self) -> _LRScheduler | ParamScheduler:
        return self._scheduler or self.trainer.scheduler

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer
        if isinstance(self.scheduler, ParamScheduler):
            max_iter, last_iter = self.trainer.max_iter, self.trainer.iter - 1
            self._scheduler = LRMultiplier(self._optimizer, self.scheduler, max_iter, last_iter)
        self._best_param_group_id = LRScheduler.get_best_param_group_id(self._optimizer)

    @staticmethod
    def get_best_param_group_id(optimizer: torch.optim.Optimizer) -> int:
        """The group with most tensors or, if all have one, with the commonest rate."""
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        if max(sizes) > 1:
            return sizes.index(max(sizes))
        rates = [group["lr"] for group in optimizer.param_groups]
        return rates.index(Counter(rates).most_common(1)[0][0])

    def after_step(self) -> None:
        lr = self._optimizer.param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        self.scheduler.step()

    def state_dict(self) -> dict:
        return self.scheduler.state_dict() if isinstance(self.scheduler, _LRScheduler) else {}

    def load_state_dict(self, state_dict: dict) -> None:
        if isinstance(self.scheduler, _LRScheduler):
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
