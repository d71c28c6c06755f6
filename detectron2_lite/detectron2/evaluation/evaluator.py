"""The evaluation loop and the interface of evaluators."""

from __future__ import annotations

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from detectron2.utils.comm import get_world_size, is_main_process

_MAX_WARMUP = 5  # first batches that do not count in the timing
_LOG_PERIOD = 5.0  # seconds
_SLOW_BATCH = 5.0  # seconds of inference after which the warm-up is logged too
_STAGES = ("Dataloading", "Inference", "Eval")


class DatasetEvaluator:
    """Sees all pairs of inputs and outputs of a data set, then computes the results."""

    def reset(self) -> None:
        """Forget everything; called before each round."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take a batch of the model's inputs and outputs, in the same order."""

    def evaluate(self) -> dict | None:
        """{task: {metric: score}}; processes other than the main one may return None."""


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one; their tasks must have different names."""

    def __init__(self, evaluators: Sequence[DatasetEvaluator]):
        self._evaluators = evaluators

    def reset(self) -> None:
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict:
        results = OrderedDict()
        for evaluator in self._evaluators:
            result = evaluator.evaluate()
            if not is_main_process() or result is None:
                continue
            for task, scores in result.items():
                assert task not in results, f"two evaluators produce results named {task}"
                results[task] = scores
        return results


class _Clock:
    """Mean seconds per batch of each stage, without the first ``warmup`` batches."""

    def __init__(self, total: int, logger: logging.Logger):
        self.total, self.warmup, self.logger = total, min(_MAX_WARMUP, total - 1), logger
        self.seconds = dict.fromkeys(_STAGES, 0.0)
        self.started = self.last = time.perf_counter()
        self.last_log = -float("inf")

    def lap(self, stage: str) -> None:
        """Count the time since the last call as ``stage``'s."""
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now

    def restart(self) -> None:
        self.seconds = dict.fromkeys(_STAGES, 0.0)
        self.started = self.last = time.perf_counter()

    def log_progress(self, index: int) -> None:
        count = index + 1 - (self.warmup if index >= self.warmup else 0)
        is_slow = self.seconds["Inference"] / count > _SLOW_BATCH
        due = time.perf_counter() - self.last_log >= _LOG_PERIOD
        if not due or not (index >= 2 * self.warmup or is_slow):
            return
        self.last_log = time.perf_counter()
        mean = (self.last_log - self.started) / count
        left = datetime.timedelta(seconds=int(mean * (self.total - index - 1)))
        stages = " ".join(f"{name}: {s / count:.4f} s/iter." for name, s in self.seconds.items())
        self.logger.info(
            f"Inference done {index + 1}/{self.total}. {stages} "
            f"Total: {mean:.4f} s/iter. ETA={left}"
        )

    def log_summary(self) -> None:
        count = max(self.total - self.warmup, 1)
        elapsed = time.perf_counter() - self.started
        for name, seconds in (("", elapsed), ("pure compute ", self.seconds["Inference"])):
            self.logger.info(
                f"Total inference {name}time: {datetime.timedelta(seconds=int(seconds))} "
                f"({seconds / count:.6f} s / iter per device, on {get_world_size()} devices)"
            )


def inference_on_dataset(
    model: Callable,
    data_loader: Iterable,
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
    callbacks: dict[str, Callable[[], Any]] | None = None,
) -> dict:
    """Run the model over a loader that has a length, without gradients, and evaluate it.

    Args:
        model: a module is in eval mode meanwhile.
        evaluator: one, several, or None to measure speed only.
        callbacks: any of "on_start", "before_inference", "after_inference", "on_end".

    Returns:
        what the evaluator returns; {} instead of None.
    """
    logger = logging.getLogger(__name__)
    total = len(data_loader)
    logger.info(f"Start inference on {total} batches")
    if evaluator is None or isinstance(evaluator, list):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()

    def call(stage: str) -> None:
        if callbacks and stage in callbacks:
            callbacks[stage]()

    clock = _Clock(total, logger)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        call("on_start")
        for index, inputs in enumerate(data_loader):
            clock.lap("Dataloading")
            if index == clock.warmup:
                clock.restart()
            call("before_inference")
            outputs = model(inputs)
            call("after_inference")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.lap("Inference")
            evaluator.process(inputs, outputs)
            clock.lap("Eval")
            clock.log_progress(index)
        call("on_end")
    clock.log_summary()
    results = evaluator.evaluate()
    return {} if results is None else results


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
