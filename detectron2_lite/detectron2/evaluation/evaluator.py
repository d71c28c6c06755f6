"""The evaluation loop and the interface of evaluators."""

from __future__ import annotations

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from detectron2.utils.comm import is_main_process
from torch import nn

logger = logging.getLogger(__name__)

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


def inference_on_dataset(
    model: Callable,
    data_loader: Iterable,
    evaluator: DatasetEvaluator | list[DatasetEvaluator] | None,
) -> dict:
    """Run the model, without gradients and, if it is a module, in eval mode, over a loader that
    has a length; returns the results of the evaluators.
    """
    total = len(data_loader)
    logger.info(f"Start inference on {total} batches")
    if evaluator is None or isinstance(evaluator, list):
        evaluator = DatasetEvaluators(evaluator or [])
    evaluator.reset()
    started = logged = time.perf_counter()
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(inference_context(model))
        stack.enter_context(torch.no_grad())
        for done, inputs in enumerate(data_loader, start=1):
            evaluator.process(inputs, model(inputs))
            now = time.perf_counter()
            if now - logged >= _LOG_PERIOD or done == total:
                logged, mean = now, (now - started) / done
                eta = datetime.timedelta(seconds=int(mean * (total - done)))
                logger.info(f"Inference done {done}/{total}. {mean:.4f} s / iter. ETA={eta}")
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
