"""Where points are drawn."""

import math

import pytest
import torch
from seeds import seeded

from s4m_d2.losses.mask_losses import sample_each, uncertain_points

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
