"""Point sampling and the mask losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_losses import bce, dice, read
from seeds import seeded

from s4m_d2.losses.mask_losses import (
    dice_loss,
    sample_each,
    sample_shared,
    sigmoid_ce_loss,
    uncertain_points,
)

logit = st.floats(-60, 60, width=32)
rows = st.lists(st.tuples(logit, st.floats(0, 1, width=32)), min_size=1, max_size=12)


@given(rows)
def test_losses_equal_double_precision_formulas(pairs):
    logits, targets = zip(*pairs, strict=True)
    x, t = torch.tensor([logits]), torch.tensor([targets])
    tolerance = {"rel": 1e-6, "abs": 2e-6}
    assert dice_loss(x, t).item() == pytest.approx(dice(logits, targets), **tolerance)
    assert sigmoid_ce_loss(x, t).item() == pytest.approx(bce(logits, targets), **tolerance)


@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    count=st.integers(0, 3),
    num_points=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_sampling_equals_literal_interpolation_with_zeros_outside(size, count, num_points, seed):
    rng = seeded(seed)
    masks = torch.randn(count, *size, generator=rng)
    points = torch.rand(count, num_points, 2, generator=rng)
    expected = torch.zeros(count, num_points)
    for row, mask, its_points in zip(expected, masks, points, strict=True):
        row[:] = torch.tensor(read(mask.double().numpy(), its_points.tolist()))
    torch.testing.assert_close(sample_each(masks, points), expected, rtol=1e-5, atol=1e-5)
    for i in range(count):
        shared = sample_shared(masks[i : i + 1], points[i])
        torch.testing.assert_close(shared[0], expected[i], rtol=1e-5, atol=1e-5)


RAMP = torch.linspace(-10, 10, 64).expand(1, 64, 64)  # crosses zero at x = 1/2


def inner_distances(points):
    """|x - 1/2| of the points away from the upper and lower border, where zeros blend in."""
    x, y = points[0].unbind(-1)
    return (x - 0.5).abs()[(y > 0.02) & (y < 0.98)]


def test_uncertain_points_gather_where_the_mask_is_undecided():
    """The best 1/8 of the candidates lie within 1/16 of the ramp's zero, or hardly further."""
    points = uncertain_points(
        RAMP,
        num_points=2000,
        oversample_ratio=8.0,
        importance_ratio=1.0,
        generator=seeded(0),
    )
    assert points.shape == (1, 2000, 2) and 0 <= points.min() and points.max() <= 1
    assert inner_distances(points).max() < 0.07
    assert points[..., 1].std() == pytest.approx(math.sqrt(1 / 12), rel=0.05)  # y stays uniform


def test_what_is_not_a_number_is_chosen_first():
    """Few pixels that diverged must show in the loss."""
    mask = torch.randn(1, 40, 40, generator=seeded(0))
    mask[0, 3:5, 7:9] = math.nan
    points = uncertain_points(
        mask,
        num_points=4000,
        oversample_ratio=3.0,
        importance_ratio=1.0,
        generator=seeded(1),
    )
    expected = 3 * 4000 * 9 / 1600  # candidates in the 3 x 3 pixels between whose centers NaN lies
    assert sample_each(mask, points).isnan().sum().item() == pytest.approx(expected, rel=0.3)
