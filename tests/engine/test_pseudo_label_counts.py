"""The warning when the number of pseudo-labels leaves its band."""

import logging
import re

import pytest
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils.events import get_event_storage

from s4m_d2.engine.training.hooks import COUNT, PseudoLabelCountHook
from s4m_d2.errors import ConfigError

BAND, ITERATIONS = (1.0, 20.0), 5


class Counts(TrainerBase):
    """Logs a number of pseudo-labels in each iteration; None: the iteration labels nothing."""

    def __init__(self, counts, hook) -> None:
        super().__init__()
        self.counts = counts
        self.register_hooks([hook])

    def run_step(self) -> None:
        if self.counts[self.iter] is not None:
            get_event_storage().put_scalar(COUNT, self.counts[self.iter])


def hook(smoothing=1, iterations=ITERATIONS):
    made = PseudoLabelCountHook(BAND, iterations)
    made.SMOOTHING = smoothing
    return made


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="s4m_d2")

    def run(counts, watching=None, start=0):
        """Messages of a run over these counts."""
        before = len(caplog.records)
        Counts(counts, watching or hook()).train(start, len(counts))
        return [record.getMessage() for record in caplog.records[before:]]

    return run


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1.0] * 20 + [20.0] * 20, 0),  # the band's ends belong to it
        ([0.5] * (ITERATIONS - 1) + [5.0], 0),
        ([0.5] * ITERATIONS, 1),
        ([0.5] * 50, 1),  # once an excursion
        (([0.5] * ITERATIONS + [5.0]) * 3, 3),
        (([0.5] * (ITERATIONS - 1) + [5.0]) * 3, 0),  # not in a row
        ([0.5, None] * (ITERATIONS - 1), 0),  # an old value is not counted twice
        ([0.5, None] * ITERATIONS, 1),
    ],
)
def test_one_warning_for_each_time_outside_long_enough(warnings, counts, expected):
    assert len(warnings(counts)) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0.0, "less than 1 .*lower S4M.PSEUDO_LABEL.SCORE_THRESH"),
        (80.0, "more than 20 .*raise S4M.PSEUDO_LABEL.SCORE_THRESH"),
    ],
)
def test_the_warning_says_which_side_and_what_to_do(warnings, count, expected):
    [message] = warnings([count] * ITERATIONS)
    assert re.search(expected, message)
    assert f"{count:.2f} pseudo-labels an image" in message


def test_single_batches_are_averaged_away(warnings):
    counts = [0.0, 9.0] * 100  # the mean is inside, half of the values are not
    assert len(warnings(counts, hook(smoothing=20))) == 0
    assert len(warnings(counts, hook(smoothing=1, iterations=1))) == 100


@pytest.mark.parametrize(
    ("counts", "average"),
    [([8.0], 8.0), ([8.0, 0.0], 4.0), ([8.0, 0.0, 0.0, 0.0], 2.0), ([8.0, *[0.0] * 5], 1.125)],
)
def test_the_average_is_the_mean_at_first_and_exponential_later(warnings, counts, average):
    watching = hook(smoothing=4, iterations=1)
    warnings(counts, watching)
    assert watching.average == pytest.approx(average)


def test_no_iterations_means_no_warning(warnings):
    assert warnings([0.0] * 50, hook(iterations=0)) == []


def test_a_continued_run_warns_where_the_unbroken_one_does(warnings):
    counts = [3.0, 0.5, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    whole = warnings(counts, hook(smoothing=2))
    assert len(whole) == 1
    for stop in range(1, len(counts)):
        first, second = hook(smoothing=2), hook(smoothing=2)
        told = warnings(counts[:stop], first)
        second.load_state_dict(first.state_dict())
        assert told + warnings(counts, second, start=stop) == whole


@pytest.mark.parametrize("band", [(), (1.0,), (5.0, 1.0), (-1.0, 5.0)])
def test_a_band_that_is_none_is_refused(band):
    with pytest.raises(ConfigError, match="S4M.PSEUDO_LABEL.COUNT_BAND is"):
        PseudoLabelCountHook(band, 5)
