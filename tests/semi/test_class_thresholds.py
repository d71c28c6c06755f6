"""Thresholds by class: by hand, their limits, and that a stored state goes on exactly."""

import pytest
import torch
from seeds import seeded

from s4m_d2.semi.filters import BATCHES, ClassThresholds

THRESH = 0.7


def logits_of(*queries):
    """Class logits of queries (class, score) among three classes and no-object, which is last."""
    rows = torch.zeros(len(queries), 4)
    for row, (index, score) in zip(rows, queries, strict=True):
        row[:] = (1 - score) / 3
        row[index] = score
    return rows.log()


def test_a_rare_class_is_judged_by_the_teachers_confidence_in_it():
    thresholds = ClassThresholds(THRESH, 3)
    assert thresholds().tolist() == pytest.approx([THRESH] * 3)
    thresholds.observe([logits_of((0, 0.9), (0, 0.7), (1, 0.6)), logits_of((0, 0.8), (3, 0.9))])
    assert thresholds().tolist() == pytest.approx([0.7, 0.7 * 0.6 / 0.8, 0.7])  # the third: unseen
    thresholds.observe([logits_of((1, 0.4), (1, 0.34))])  # the last one is below the floor
    assert thresholds().tolist() == pytest.approx([0.7, 0.7 * 0.5 / 0.8, 0.7])
    for _ in range(3):
        thresholds.observe([logits_of((0, 0.99), (1, 0.36)), torch.full((2, 4), torch.nan)])
    assert thresholds()[1].item() == pytest.approx(0.35)  # the floor


def test_no_threshold_is_above_the_given_one_or_below_half_of_it():
    thresholds, generator = ClassThresholds(THRESH, 5), seeded(0)
    for _ in range(BATCHES + 20):
        thresholds.observe([4 * torch.randn(6, 6, generator=generator)])
        assert thresholds().max() == torch.tensor(THRESH) and thresholds().min() >= 0.35
    assert thresholds().min() < 0.68


def test_a_stored_state_goes_on_exactly():
    batches = [[4 * torch.randn(6, 6, generator=seeded(i))] for i in range(6)]
    whole, first, second = (ClassThresholds(THRESH, 5) for _ in range(3))
    for batch in batches[:3]:
        first.observe(batch)
    second.load_state_dict(first.state_dict())
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        for batch in batches:
            whole.observe(batch)
    for batch in batches[3:]:
        second.observe(batch)
    assert torch.equal(second(), whole()) and not torch.equal(first(), whole())
