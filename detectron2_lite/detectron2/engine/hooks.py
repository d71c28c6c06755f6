"""Common hooks of a training run."""

from __future__ import annotations

import datetime
import logging
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.checkpoint import Checkpointer
from fvcore.common.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from fvcore.common.param_scheduler import ParamScheduler
from fvcore.common.timer import Timer
from torch.optim.lr_scheduler import LRScheduler as _LRScheduler

from .train_loop import HookBase, TrainerBase

__all__ = [
    "BestCheckpointer", "CallbackHook", "EvalHook", "IterationTimer", "LRScheduler",
    "PeriodicCheckpointer", "PeriodicWriter",
]

_Callback = Callable[[TrainerBase], Any] | None


class CallbackHook(HookBase):
    """A hook made of functions that take the trainer."""

    def __init__(
        self, *, before_train: _Callback = None, after_train: _Callback = None,
        before_step: _Callback = None, after_step: _Callback = None,
    ):
        self._before_train, self._after_train = before_train, after_train
        self._before_step, self._after_step = before_step, after_step

    def before_train(self) -> None:
        if self._before_train:
            self._before_train(self.trainer)

    def after_train(self) -> None:
        if self._after_train:
            self._after_train(self.trainer)
        # closures may hold the trainer
        self._before_train = self._after_train = self._before_step = self._after_step = None

    def before_step(self) -> None:
        if self._before_step:
            self._before_step(self.trainer)

    def after_step(self) -> None:
        if self._after_step:
            self._after_step(self.trainer)


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
        if count > 0 and in_steps > 0:
            speed = f"{count} iterations ({in_steps / count:.4f} s / it)"
            logger.info(f"Overall training speed: {speed}")
        logger.info(f"Total training time: {total}, {int(in_steps)} s of it outside of hooks")


class PeriodicWriter(HookBase):
    """Calls the writers every ``period`` iterations and at the end, then closes them."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20):
        for writer in writers:
            assert isinstance(writer, EventWriter), f"not an EventWriter: {writer!r}"
        self._writers = writers
        self._period = period

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
        self._optimizer = optimizer
        self._scheduler = scheduler

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
        """The group to report: the one with most tensors or, if all have one, of the commonest
        rate."""
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


class _PeriodicEvaluation(HookBase):
    """Acts every ``_period`` iterations (0: never), and after the last one if all went well."""

    _period: int
    _at_end = True

    def _act(self) -> None:
        raise NotImplementedError

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._act()

    def after_train(self) -> None:
        if self._at_end and self.trainer.iter + 1 >= self.trainer.max_iter:
            self._act()


class EvalHook(_PeriodicEvaluation):
    """Evaluates every ``eval_period`` iterations (0: never) and, if asked, after training.

    ``eval_function`` returns a nested dict of numbers, put as scalars named "task/metric", or
    nothing. All processes or none have this hook, because it ends with a barrier.
    """

    def __init__(
        self, eval_period: int, eval_function: Callable[[], Any], eval_after_train: bool = True
    ):
        self._period, self._func, self._at_end = eval_period, eval_function, eval_after_train

    def _act(self) -> None:
        if results := self._func():
            assert isinstance(results, dict), f"eval_function must return a dict, got {results!r}"
            scalars = flatten_results_dict(results)
            try:
                scalars = {name: float(value) for name, value in scalars.items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f"[EvalHook] not a nested dict of numbers: {scalars}") from error
            self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        comm.synchronize()

    def after_train(self) -> None:
        super().after_train()
        self._func = None  # it may hold the trainer


class BestCheckpointer(_PeriodicEvaluation):
    """Saves ``file_prefix`` whenever a metric improves; goes after the ``EvalHook``.

    Args:
        eval_period: the ``EvalHook``'s period.
        val_metric: name of the scalar to follow, such as "segm/AP50".
        mode: "max" or "min", what is better.
    """

    def __init__(
        self, eval_period: int, checkpointer: Checkpointer, val_metric: str,
        mode: str = "max", file_prefix: str = "model_best",
    ):
        assert mode in ("max", "min"), f"mode is 'max' or 'min', not {mode!r}"
        self._period, self._checkpointer, self._val_metric = eval_period, checkpointer, val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def _act(self) -> None:
        logger = logging.getLogger(__name__)
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, None))
        if not math.isfinite(value):
            logger.warning(f"{self._val_metric} is missing or not finite: no best checkpoint")
        elif self.best_metric is None or self._is_better(value, self.best_metric):
            self._checkpointer.save(self._file_prefix, iteration=iteration)
            self.best_metric, self.best_iter = value, iteration
            logger.info(f"Saved best model: {self._val_metric} is {value:.5f} @ {iteration}")
