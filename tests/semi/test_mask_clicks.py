"""The clicks that refinement draws inside each mask."""

from collections import Counter
from itertools import permutations

import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import sample_mask_points
from s4m_d2.structures import PseudoLabels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_selection(mask_logits: Tensor, content_size=None, mask_thresh=0.0) -> Selection:
    count, height, width = mask_logits.shape
    labels = PseudoLabels(
        torch.arange(count) + 10, mask_logits > mask_thresh, torch.linspace(0.7, 1.0, count)
    )
    return Selection(labels, mask_logits, content_size or (height, width), {"kept": count})


def pixels_of(points: Tensor, content_size) -> Tensor:
    return (points * torch.tensor(content_size[::-1])).floor().long()


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 4),
    num_points=st.integers(1, 7),
    density=st.sampled_from([-4.0, -1.5, 0.0, 2.0]),
)
def test_clicks_are_distinct_centers_of_pixels_inside_the_mask(seed, count, num_points, density):
    size = (5, 7)
    selection = make_selection(torch.randn(count, *size, generator=seeded(seed)) + density)
    points, labels = sample_mask_points(selection, num_points, seeded(seed + 1))
    assert points.shape == (count, num_points, 2) and labels.shape == (count, num_points)
    centers = points * torch.tensor(size[::-1])
    torch.testing.assert_close(centers - centers.floor(), torch.full_like(centers, 0.5))
    for mask, pixels, label in zip(
        selection.labels.masks, centers.floor().long(), labels, strict=True
    ):
        clicked = [
            (x, y) for (x, y), positive in zip(pixels.tolist(), label, strict=True) if positive == 1
        ]
        assert set(label.tolist()) <= {1, -1}
        assert len(clicked) == min(num_points, int(mask.sum()))
        assert len(set(clicked)) == len(clicked)
        assert all(mask[y, x] for x, y in clicked)


def test_a_mask_smaller_than_its_clicks_takes_every_pixel():
    logits = torch.full((1, 4, 4), -2.0)
    logits[0, 1, 2] = logits[0, 3, 0] = 1.0
    points, labels = sample_mask_points(make_selection(logits), 3, seeded(0))
    assert labels.tolist() == [[1, 1, -1]]
    assert sorted(points[0, :2].tolist()) == [[0.125, 0.875], [0.625, 0.375]]


def test_the_first_click_follows_the_softmax_over_the_pixels_inside():
    logits = torch.tensor([[[2.0, 0.5, 9.0], [1.0, 0.1, 1.5]]])
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    labels = PseudoLabels(torch.zeros(1).long(), mask, torch.ones(1))
    copies = 20000
    selection = Selection(
        labels[torch.zeros(copies).long()], logits.repeat(copies, 1, 1), (2, 3), {}
    )
    points, _ = sample_mask_points(selection, 1, seeded(0))
    pixels = pixels_of(points[:, 0], (2, 3))
    counts = (pixels[:, 1] * 3 + pixels[:, 0]).bincount(minlength=6).double()
    inside = mask.flatten()
    expected = logits.flatten()[inside].double().softmax(0) * copies
    assert counts[~inside].sum() == 0
    assert chisquare(counts[inside].numpy(), expected.numpy()).pvalue > 0.01


def test_clicks_without_replacement_follow_the_sequential_draw():
    """Each ordered pair (a, b) has probability p_a * p_b / (1 - p_a)."""
    logits = torch.tensor([[[2.0, 0.5, 1.0, 0.1]]])
    copies = 20000
    points, _ = sample_mask_points(make_selection(logits.repeat(copies, 1, 1)), 2, seeded(0))
    counts = Counter(map(tuple, pixels_of(points, (1, 4))[:, :, 0].tolist()))
    p = logits.flatten().double().softmax(0).tolist()
    pairs = list(permutations(range(4), 2))
    expected = [copies * p[a] * p[b] / (1 - p[a]) for a, b in pairs]
    assert chisquare([counts[pair] for pair in pairs], expected).pvalue > 0.01


def test_clicks_are_normalized_to_a_content_that_ends_inside_a_pixel():
    logits = torch.full((1, 4, 4), -1.0)
    logits[0, 3, 3] = logits[0, 0, 0] = 1.0
    selection = make_selection(logits, content_size=(3.25, 4.0))
    points, _ = sample_mask_points(selection, 2, seeded(0))
    expected = [[0.5 / 4, 0.5 / 3.25], [3.5 / 4, 1.0]]  # the center (3.5) lies below the content
    torch.testing.assert_close(torch.tensor(sorted(points[0].tolist())), torch.tensor(expected))
