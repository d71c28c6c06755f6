"""Hooks that matter where several processes train one model."""

import itertools

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

from s4m_d2.engine.training.processes import FinishedEvalHook

ITERATIONS = 3


class FailAt(HookBase):
    def __init__(self, iteration: int | None) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise ConnectionError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, data):
        return {"loss": self.weight * 1.0}


@pytest.mark.parametrize("fail_at", [None, 0, ITERATIONS - 1])
def test_a_run_is_evaluated_at_its_end_unless_it_fails(fail_at):
    """Even in the last iteration: the other processes are not in the evaluation."""
    model, evaluated = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    evaluation = FinishedEvalHook(0, lambda: evaluated.append(True))
    trainer.register_hooks([FailAt(fail_at), evaluation])
    try:
        trainer.train(0, ITERATIONS)
    except ConnectionError:
        assert fail_at is not None
    assert len(evaluated) == (fail_at is None)
