"""Filters of pseudo-labels: thresholds by class, quality and doubts, duplicates."""

import math
from dataclasses import replace

import pytest
import torch
from hand_made import make_selection, rectangle
from hypothesis import given
from hypothesis import strategies as st
from seeds import seeded

from s4m_d2.semi.filters import (
    BATCHES,
    ClassThresholds,
    drop_duplicates,
    drop_low_quality,
    mask_quality,
)
from s4m_d2.structures import PseudoLabels

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


SIZE = (4, 8)
NINE_TENTHS = math.log(9.0)  # the logit of 0.9


def selection_of(*masks):
    return make_selection(torch.stack([mask * (2 * NINE_TENTHS) - NINE_TENTHS for mask in masks]))


LEFT, RIGHT = rectangle(SIZE, 0, 0, 4, 4), rectangle(SIZE, 0, 4, 4, 4)


def test_certainty_times_agreement_times_sams_iou():
    selection = selection_of(LEFT, LEFT, LEFT, RIGHT)
    masks = torch.stack([LEFT, rectangle(SIZE, 0, 0, 4, 2), LEFT, LEFT])
    refined = replace(selection.labels, masks=masks)
    certain = torch.tensor([0.9, 0.9 / 2, 0.9, 0.0])
    torch.testing.assert_close(mask_quality(selection, refined), certain)  # no predicted IoUs
    ious = torch.tensor([0.5, 0.8, math.nan, 1.0])  # the third mask is the teacher's
    found = mask_quality(selection, replace(refined, sam_ious=ious))
    torch.testing.assert_close(found, torch.tensor([0.45, 0.36, 0.9, 0.0]))


def test_labels_below_the_threshold_are_dropped():
    labels = selection_of(LEFT, RIGHT, LEFT).labels
    labels = replace(labels, quality=torch.tensor([0.5, 0.25, 0.75]))
    [kept, nothing] = drop_low_quality([labels, labels[:0]], 0.5)
    assert kept.labels.tolist() == [10, 12] and kept.quality.tolist() == [0.5, 0.75]
    assert len(nothing) == 0


@pytest.mark.parametrize("factor", [1, 2])
def test_doubt_is_the_probability_to_be_wrong(factor):
    logits = torch.tensor([[[0.0, NINE_TENTHS], [-NINE_TENTHS, 30.0]]])
    size = (2 * factor, 2 * factor)
    doubts = make_selection(logits).doubts_at(size)
    corners = doubts[0, :: size[0] - 1, :: size[1] - 1]
    assert doubts.shape == (1, *size) and corners.tolist() == [[128, 26], [26, 0]]


GRID = (10, 10)
MASK = rectangle(GRID, 0, 0, 1, 5)


def labels_of(masks, scores) -> PseudoLabels:
    return PseudoLabels(torch.zeros(len(scores)).long(), torch.stack(masks), torch.tensor(scores))


def kept(labels: PseudoLabels, *threshs: float) -> list[bool]:
    """Which labels stay; told apart by classes, which do not matter."""
    named = replace(labels, labels=torch.arange(len(labels)))
    [left] = drop_duplicates([named], *threshs)
    assert torch.equal(left.masks, labels.masks[left.labels])
    assert torch.equal(left.scores, labels.scores[left.labels])
    return [index in left.labels.tolist() for index in range(len(labels))]


def test_duplicates_of_images_are_looked_at_alone_and_may_be_empty():
    labels = [labels_of([MASK], [0.9]), PseudoLabels.empty(GRID), labels_of([MASK], [0.8])]
    assert [len(label) for label in drop_duplicates(labels, 0.5)] == [1, 0, 1]
    assert drop_duplicates([], 0.5) == []


@given(
    seed=st.integers(0, 1000),
    iou_thresh=st.sampled_from([0.25, 0.5, 1.0]),
    overlap_thresh=st.sampled_from([0.5, 0.75, 1.0]),
    has_quality=st.booleans(),
)
def test_duplicates_are_as_defined(seed, iou_thresh, overlap_thresh, has_quality):
    """Masks are small: some are empty, and many IoUs and overlaps equal the thresholds."""
    generator = seeded(seed)
    places = torch.randint(0, 4, (8, 4), generator=generator).tolist()
    masks = [rectangle(GRID, *place) for place in places]
    values = (torch.randint(0, 4, (8,), generator=generator) / 4).tolist()
    labels = labels_of(masks, [1.0] * 8 if has_quality else values)
    if has_quality:
        labels = replace(labels, quality=torch.tensor(values))
    expected = []
    for i in range(8):
        better = [j for j in range(8) if (-values[j], j) < (-values[i], i)]
        is_same = False
        for j in better:
            shared, either = ((masks[i] & masks[j]).sum(), (masks[i] | masks[j]).sum())
            is_same |= bool(shared > iou_thresh * either)
            is_same |= bool(shared > overlap_thresh * min(masks[i].sum(), masks[j].sum()))
        expected.append(not is_same)
    assert kept(labels, iou_thresh, overlap_thresh) == expected
