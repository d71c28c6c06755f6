"""Where points are drawn."""

import math

import pytest
import torch
from seeds import seeded

from s4m_d2.losses.mask_losses import sample_each, uncertain_points


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
