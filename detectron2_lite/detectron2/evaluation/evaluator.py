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
from detectron2.utils.comm import get_world_size, is_main_process
from detectron2.utils.logger import log_every_n_seconds
from torch import nn

_MAX_WARMUP = 5  # first batches, which do not count in the timing
_LOG_PERIOD = 5  # seconds


class DatasetEvaluator:
    """After ``reset``, sees all batches of a model's inputs and outputs, then evaluates them.

    ``evaluate`` returns {task: {metric: score}}, or None on other processes than the main one.
    """

    def reset(self) -> None: ...

    def process(self, inputs: list[dict], outputs: list[dict]) -> None: ...

    def evaluate(self) -> dict | None: ...


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
            if is_main_process() and result is not None:
                assert not results.keys() & result.keys(), f"not unique: {list(result)}"
                results.update(result)
        return results


class _Clock:
    """Seconds spent in each stage, without the first batches."""

    def __init__(self, total: int):
        self.total, self.warmup, self.count = total, min(_MAX_WARMUP, total - 1), 0
        self.restart()

    def restart(self) -> None:
        self.seconds = {"Dataloading": 0.0, "Inference": 0.0, "Eval": 0.0}
        self.started = self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as ``stage``'s."""
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now

    def log_batch(self) -> None:
        self.count += 1
        if (timed := self.count - self.warmup) <= 0:
            self.restart()
            return
        stages = " ".join(f"{name}: {s / timed:.4f} s/iter." for name, s in self.seconds.items())
        mean = (self.last - self.started) / timed
        eta = datetime.timedelta(seconds=int(mean * (self.total - self.count)))
        message = f"Inference done {self.count}/{self.total}. {stages} ETA={eta}"
        log_every_n_seconds(logging.INFO, message, n=_LOG_PERIOD, name=__name__)
        if self.count == self.total:
            took = f"{mean:.6f} s / iter per device, on {get_world_size()} devices"
            logging.getLogger(__name__).info(f"Inference took {took}. {stages}")


def inference_on_dataset(
    model: Callable, data_loader: Iterable,
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
    callbacks: dict[str, Callable[[], Any]] | None = None,
) -> dict:
    """Run the model, without gradients, over a loader that has a length; returns the evaluator's
    results.

    Args:
        model: a module is in eval mode meanwhile.
        evaluator: one, several, or None to measure the speed only.
        callbacks: any of "on_start", "before_inference", "after_inference", "on_end".
    """
    total = len(data_loader)
    logging.getLogger(__name__).info(f"Start inference on {total} batches")
    if evaluator is None or isinstance(evaluator, list):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()

    def call(stage: str) -> None:
        if callbacks and stage in callbacks:
            callbacks[stage]()

    clock = _Clock(total)
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        call("on_start")
        for inputs in data_loader:
            clock.lap("Dataloading")
            call("before_inference")
            outputs = model(inputs)
            call("after_inference")
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            clock.lap("Inference")
            evaluator.process(inputs, outputs)
            clock.lap("Eval")
            clock.log_batch()
        call("on_end")
    return evaluator.evaluate() or {}


@contextmanager
def inference_context(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
