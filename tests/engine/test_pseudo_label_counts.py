"""The warning when the number of pseudo-labels leaves its band."""

import logging

import pytest
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils.events import get_event_storage

from s4m_d2.engine.training.hooks import COUNT, PseudoLabelCountHook, UnwrittenMetricsHook

BAND, ITERATIONS = (1.0, 20.0), 5


class Counts(TrainerBase):
    """Logs a number of pseudo-labels in each iteration; None: the iteration labels nothing."""

    def __init__(self, counts, hook) -> None:
        super().__init__()
        self.counts = counts
        self.register_hooks([UnwrittenMetricsHook("none"), hook])

    def run_step(self) -> None:
        if self.counts[self.iter] is not None:
            get_event_storage().put_scalar(COUNT, self.counts[self.iter])


def hook(smoothing=1, iterations=ITERATIONS):
    made = PseudoLabelCountHook(BAND, iterations)
    made.SMOOTHING = smoothing
    return made


@pytest.fixture
def warnings(caplog):
    """(trainer, start) → messages of a run over its counts."""
    caplog.set_level(logging.WARNING, logger="s4m_d2")

    def run(trainer, start=0):
        before = len(caplog.records)
        trainer.train(start, len(trainer.counts))
        return [record.getMessage() for record in caplog.records[before:]]

    return run


def test_one_warning_for_each_time_outside_long_enough(warnings):
    for counts, options, expected in (
        ([1.0] * 20 + [20.0] * 20, {}, 0),  # the band's ends belong to it
        ([0.5] * (ITERATIONS - 1) + [5.0], {}, 0),
        ([0.5] * 50, {}, 1),  # once an excursion
        ([80.0] * ITERATIONS, {}, 1),
        (([0.5] * ITERATIONS + [5.0]) * 3, {}, 3),
        (([0.5] * (ITERATIONS - 1) + [5.0]) * 3, {}, 0),  # not in a row
        ([0.5, None] * (ITERATIONS - 1), {}, 0),  # an old value is not counted twice
        ([0.5, None] * ITERATIONS, {}, 1),
        ([0.0, 9.0] * 100, {"smoothing": 20}, 0),  # the mean is inside, half of them are not
        ([0.0, 9.0] * 100, {"iterations": 1}, 100),
        ([0.0] * 50, {"iterations": 0}, 0),
    ):
        assert len(warnings(Counts(counts, hook(**options)))) == expected


def test_a_continued_run_warns_where_the_unbroken_one_does(warnings):
    counts = [3.0, 0.5, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    whole = warnings(Counts(counts, hook(smoothing=2)))
    assert len(whole) == 1
    for stop in range(1, len(counts)):
        first, second = (Counts(part, hook(smoothing=2)) for part in (counts[:stop], counts))
        told = warnings(first)
        first.iter = stop - 1  # as a checkpoint is saved
        second.load_state_dict(first.state_dict())
        assert told + warnings(second, start=stop) == whole
