"""Quality and doubts by hand."""

import math
from dataclasses import replace

import pytest
import torch
from hand_made import make_selection, rectangle

from s4m_d2.semi.filters import drop_low_quality, mask_quality
from s4m_d2.semi.refinement import teacher_doubts

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
    doubts = teacher_doubts(make_selection(logits), size)
    corners = doubts[0, :: size[0] - 1, :: size[1] - 1]
    assert doubts.shape == (1, *size) and corners.tolist() == [[128, 26], [26, 0]]
