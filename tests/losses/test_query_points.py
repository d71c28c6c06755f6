"""The query points of structural distillation."""

import torch
from scipy.stats import chisquare, kstest
from seeds import seeded

from s4m_d2.losses.structural_distillation import sample_query_points


def test_foreground_points_are_uniform_over_the_union_of_the_masks():
    size = (5, 8)
    masks = torch.zeros(2, 7, 9, dtype=torch.bool)  # padded frame
    masks[0, 1:4, 2:5] = True
    masks[1, 3, 3:8] = True
    masks[1, 6, 8] = True  # padding: never drawn
    inside = torch.nonzero(masks[:, :5, :8].any(0).flatten()).flatten()
    generator = seeded(1)
    draws = [sample_query_points(masks, size, 1, 1, generator) for _ in range(1500)]
    points = torch.cat(draws) * torch.tensor([8, 5])
    pixels = points.floor().long()
    counts = (pixels[:, 1] * 8 + pixels[:, 0]).bincount(minlength=40)
    assert counts.sum() == counts[inside].sum()
    assert chisquare(counts[inside].numpy()).pvalue > 0.01
    assert kstest((points - pixels).flatten().numpy(), "uniform").pvalue > 0.01


def test_foreground_pixels_are_distinct_and_random_points_fill_up():
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 4:6, 10:12] = True
    points = sample_query_points(masks, (20, 30), 500, 400, seeded())
    pixels = (points * torch.tensor([30, 20])).floor().long()
    foreground = sorted(map(tuple, pixels[:4].tolist()))
    assert foreground == [(10, 4), (10, 5), (11, 4), (11, 5)]
    assert len(set(map(tuple, pixels[4:400].tolist()))) < 396, "not pixels without replacement"
    assert kstest(points[4:].flatten().numpy(), "uniform").pvalue > 0.01
    assert ((points >= 0) & (points <= 1)).all()
