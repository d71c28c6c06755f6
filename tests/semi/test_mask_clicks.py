"""The clicks that refinement draws inside each mask."""

import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from hand_made import make_selection, rectangle
from scipy.stats import chisquare
from seeds import seeded
from torch import Tensor

from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import neighbor_points, sample_mask_points
from s4m_d2.structures import PseudoLabels


def pixels_of(points: Tensor, content_size) -> Tensor:
    return (points * torch.tensor(content_size[::-1])).floor().long()


MASK = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1]]).bool()  # five pixels, 0 to 4 row by row
INSIDE = [
    pytest.param([0.0, 0.0, 0.0, 0.0, 0.0], id="even"),
    pytest.param([2.0, 0.5, 1.0, 0.1, 1.5], id="uneven"),
    pytest.param([40.0, 41.0, 40.5, 39.2, 40.1], id="probabilities of 1"),
    pytest.param([-1.0, 0.7, -0.2, 0.3, -2.0], id="below the threshold of 0.5"),
]


def draw_clicks(inside: list[float], num_points: int, copies: int) -> list[tuple[int, ...]]:
    """The pixels of MASK, in order, that were clicked in each of ``copies`` draws.

    The pixels outside have the highest logit of all.
    """
    logits = torch.full(MASK.shape, 50.0).masked_scatter(MASK, torch.tensor(inside))
    selection = Selection(
        PseudoLabels(torch.zeros(copies).long(), MASK.expand(copies, -1, -1), torch.ones(copies)),
        logits.repeat(copies, 1, 1),
        tuple(MASK.shape),
        {},
    )
    points, labels = sample_mask_points(selection, num_points, seeded(0))
    assert (labels == 1).all()
    x, y = pixels_of(points, MASK.shape).unbind(-1)
    number = torch.full(MASK.shape, -1).masked_scatter(MASK, torch.arange(5))
    return list(map(tuple, number[y, x].tolist()))


def successive_probabilities(inside: list[float], num_points: int) -> dict[tuple, float]:
    """P of each ordered draw: softmax over what is left, one pixel after the other."""
    weights = [math.exp(value - max(inside)) for value in inside]
    probabilities = {}
    for order in permutations(range(len(inside)), num_points):
        probability, left = 1.0, sum(weights)
        for pixel in order:
            probability *= weights[pixel] / left
            left -= weights[pixel]
        probabilities[order] = probability
    return probabilities


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("num_points", [1, 3, 4])
def test_clicks_follow_the_successive_draw_by_softmax_without_replacement(inside, num_points):
    counts = Counter(draw_clicks(inside, num_points, copies=40000))
    probabilities = successive_probabilities(inside, num_points)
    assert set(counts) <= set(probabilities)
    observed = [counts[outcome] for outcome in probabilities]
    expected = [40000 * probability for probability in probabilities.values()]
    assert chisquare(observed, expected).pvalue > 0.001


def test_a_mask_whose_logits_are_far_apart_still_gives_all_its_pixels():
    logits = torch.full((1, 4, 4), -500.0)
    logits[0, 0, 0], logits[0, 2, 1], logits[0, 2, 3] = 900.0, 1.0, 400.0
    for seed in range(20):
        points, labels = sample_mask_points(make_selection(logits), 4, seeded(seed))
        clicked = pixels_of(points[0, :3], (4, 4)).tolist()
        assert labels.tolist() == [[1, 1, 1, -1]]
        assert clicked[0] == [0, 0] and sorted(clicked) == [[0, 0], [1, 2], [3, 2]]


def test_negative_points_are_in_the_nearest_other_masks_and_never_in_the_own_one():
    """Content of 4 x 11.5 px. Mask 1 overlaps 0 where it is most certain; 3 is a part of 2."""
    size = (4, 12)
    masks = [(0, 0, 4, 4), (0, 3, 2, 4), (0, 9, 4, 3), (3, 10, 1, 2)]
    logits = torch.full((4, *size), -9.0)
    for of_mask, place in zip(logits, masks, strict=True):
        of_mask[rectangle(size, *place)] = 1.0
    logits[1, 0, 3], logits[1, 1, 5], logits[0, 2, 1] = 8.0, 4.0, 3.0
    logits[2, 1, 9], logits[3, 3, 11], logits[3, 0, 0] = 5.0, 2.0, -1.0
    points, labels = neighbor_points(make_selection(logits, (4.0, 11.5)), 2)
    assert labels.tolist() == [[0, 0], [0, 0], [-1, 0], [0, 0]]
    # Centers: x = 2, 5, 10.5, 11. Nearest of 0: 1, 2; of 1: 0, 2; of 2: 3, 1; of 3: 2, 1.
    pixels = [[(5, 1), (9, 1)], [(1, 2), (9, 1)], [(-1, -1), (3, 0)], [(9, 1), (3, 0)]]
    expected = (torch.tensor(pixels) + 0.5) / torch.tensor([11.5, 4.0])
    torch.testing.assert_close(points[labels == 0], expected[labels == 0])
    for count in (0, 1):
        points, labels = neighbor_points(make_selection(logits[:count]), 2)
        assert points.shape == (count, 0, 2) and labels.shape == (count, 0)
