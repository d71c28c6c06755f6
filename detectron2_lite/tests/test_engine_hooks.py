"""When the common hooks act, and what they do."""

import logging

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import (
    EvalHook,
    IterationTimer,
    LRScheduler,
    PeriodicCheckpointer,
    PeriodicWriter,
)
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.checkpoint import Checkpointer
from torch import nn


class Loop(TrainerBase):
    """Does nothing but run hooks; fails in iteration ``fail_at``."""

    def __init__(self, *hooks, fail_at=None):
        super().__init__()
        self.fail_at = fail_at
        self.register_hooks(hooks)

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("failed on purpose")


class CountingWriter(EventWriter):
    def __init__(self):
        self.written, self.closed = [], False

    def write(self):
        assert not self.closed
        self.written.append(get_event_storage().iter)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("last, expected", [(8, [2, 5, 7, 8]), (6, [2, 5, 6])])
def test_writers_write_each_period_and_at_the_end_and_close(last, expected):
    writer = CountingWriter()
    Loop(PeriodicWriter([writer], period=3)).train(0, last)
    assert writer.written == expected
    assert writer.closed


def test_only_writers_can_be_written():
    with pytest.raises(AssertionError):
        PeriodicWriter([print])


@pytest.mark.parametrize(
    "period, at_end, expected",
    [(2, True, [1, 3, 5]), (2, False, [1, 3]), (4, True, [3, 6]), (0, True, [6]), (0, False, [])],
)
def test_evaluation_runs_each_period_and_once_at_the_end(period, at_end, expected):
    loop, last = Loop(), 5 if (period, at_end) == (2, True) else 6
    runs = []
    loop.register_hooks([EvalHook(period, lambda: runs.append(loop.iter), at_end)])
    loop.train(0, last)
    assert runs == expected


def test_evaluation_results_become_unsmoothed_scalars():
    loop = Loop(EvalHook(1, lambda: {"segm": {"AP": loop.iter, "AP50": 60.5}, "speed": 3}))
    loop.train(0, 2)
    assert loop.storage.latest() == {
        "segm/AP": (2.0, 2), "segm/AP50": (60.5, 2), "speed": (3.0, 2),
    }  # fmt: skip
    assert loop.storage.latest_with_smoothing_hint() == loop.storage.latest()


def test_evaluation_does_not_follow_a_failure():
    runs = []
    with pytest.raises(RuntimeError, match="on purpose"):
        Loop(EvalHook(0, lambda: runs.append(1)), fail_at=2).train(0, 5)
    assert not runs


def test_evaluation_results_must_be_numbers():
    with pytest.raises(ValueError, match="nested dict"):
        Loop(EvalHook(1, lambda: {"segm": "good"})).train(0, 2)


class Names(Checkpointer):
    """Notes the names and iterations of checkpoints instead of writing them."""

    def __init__(self):
        super().__init__(nn.Identity())
        self.saved = []

    def save(self, name, **kwargs):
        self.saved.append((name, kwargs["iteration"]))


def test_checkpoints_are_named_after_the_iteration_they_follow():
    checkpointer = Names()
    Loop(PeriodicCheckpointer(checkpointer, period=2)).train(0, 5)
    expected = [("model_0000001", 1), ("model_0000003", 3), ("model_final", 4)]
    assert checkpointer.saved == expected


def optimizer_of(*groups):
    """An SGD optimizer with (number of tensors, learning rate) groups."""
    parameters = [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)], "lr": lr}
                  for n, lr in groups]  # fmt: skip
    return torch.optim.SGD(parameters, lr=1.0)


def test_the_reported_rate_is_that_of_most_parameters():
    optimizer = optimizer_of((1, 0.1), (3, 0.2), (2, 0.3))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    loop = Loop(LRScheduler(optimizer, scheduler))
    optimizer.step()
    loop.train(0, 1)
    assert loop.storage.latest()["lr"] == (0.2, 0)


def test_a_torch_scheduler_is_stepped_after_its_rate_is_reported():
    optimizer = optimizer_of((1, 1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    loop = Loop(LRScheduler(optimizer, scheduler))
    optimizer.step()
    loop.train(0, 3)
    assert [v for v, _ in loop.storage.history("lr").values()] == [1.0, 0.5, 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert loop.state_dict()["hooks"]["LRScheduler"]["last_epoch"] == 3


def test_iteration_times_leave_out_the_warm_up(caplog):
    loop = Loop(IterationTimer(warmup_iter=3))
    logger = logging.getLogger("detectron2.engine.hooks")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        loop.train(10, 15)
    logger.removeHandler(caplog.handler)
    times = loop.storage.history("time").values()
    assert [iteration for _, iteration in times] == [12, 13, 14]
    assert all(seconds >= 0 for seconds, _ in times)
    assert "Total training time" in caplog.text
