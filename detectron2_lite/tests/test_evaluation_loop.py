"""The evaluation loop, combined evaluators, and the reporting of results."""

import logging

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs):
        self.modes = (self.training, torch.is_grad_enabled())
        return [self.weight * x for x in inputs]


class Collector(DatasetEvaluator):
    def __init__(self, task="pairs"):
        self.task, self.resets = task, 0

    def reset(self):
        self.resets += 1
        self.pairs = []

    def process(self, inputs, outputs):
        self.pairs += [(x, y.item()) for x, y in zip(inputs, outputs, strict=True)]

    def evaluate(self):
        return {self.task: {"count": len(self.pairs)}} if self.pairs else None


BATCHES = [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize("was_training", [True, False])
def test_every_pair_is_processed_in_eval_mode_without_gradients(was_training):
    model, evaluator = Doubler().train(was_training), Collector()
    assert inference_on_dataset(model, BATCHES, evaluator) == {"pairs": {"count": 3}}
    assert evaluator.pairs == [(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]
    assert evaluator.resets == 1
    assert model.modes == (False, False)
    assert model.training == was_training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("batches", [7, 20])
def test_longer_loaders_pass_the_timing_warm_up(batches):
    results = inference_on_dataset(Doubler(), [[1.0]] * batches, Collector())
    assert results == {"pairs": {"count": batches}}


def test_a_model_may_be_a_function():
    evaluator = Collector()
    inference_on_dataset(lambda inputs: [torch.tensor(0.0) for _ in inputs], BATCHES, evaluator)
    assert evaluator.pairs == [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)]


def test_no_result_is_an_empty_one():
    class Silent(Collector):
        def evaluate(self):
            return None

    assert inference_on_dataset(Doubler(), BATCHES, Silent()) == {}
    assert inference_on_dataset(Doubler(), BATCHES, None) == {}


def test_several_evaluators_give_one_result():
    evaluators = [Collector("a"), Collector("b")]
    results = inference_on_dataset(Doubler(), BATCHES, evaluators)
    assert results == {"a": {"count": 3}, "b": {"count": 3}}
    assert list(results) == ["a", "b"]


def test_evaluators_with_the_same_task_collide():
    with pytest.raises(AssertionError, match="same"):
        inference_on_dataset(Doubler(), BATCHES, DatasetEvaluators([Collector("same")] * 2))


def test_the_context_restores_the_mode():
    for mode in (True, False):
        model = Doubler().train(mode)
        with inference_context(model):
            assert not model.training
        assert model.training == mode


def test_nested_results_flatten_to_paths():
    nested = {"segm": {"AP": 1, "by": {"car": 2}}, "speed": 3}
    assert flatten_results_dict(nested) == {"segm/AP": 1, "segm/by/car": 2, "speed": 3}


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("detectron2.evaluation.testing")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        yield caplog
    logger.removeHandler(caplog.handler)


def test_the_csv_lines_leave_out_classes(log):
    print_csv_format({"segm": {"AP": 12.34567, "AP50": 20.0, "AP-car": 5.0}})
    messages = list(dict.fromkeys(record.getMessage() for record in log.records))
    assert messages == ["copypaste: Task: segm", "copypaste: AP,AP50", "copypaste: 12.3457,20.0000"]


@pytest.mark.parametrize(
    "expected, passes",
    [
        ([], True),
        ([["segm", "AP", 40.0, 0.5]], True),
        ([["segm", "AP", 41.0, 0.5]], False),
        ([["segm", "AP50", 60.0, 1.0]], False),
        ([["segm", "APs", 0.0, 100.0]], False),
    ],
)
def test_results_are_verified(expected, passes):
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = expected
    results = {"segm": {"AP": 40.4, "APs": float("nan")}}
    if passes:
        assert verify_results(cfg, results)
    else:
        with pytest.raises(SystemExit):
            verify_results(cfg, results)
