"""Hungarian matching."""

import itertools

import pytest
import torch
from problems import make_criterion, random_layers, random_targets
from seeds import seeded

CLASSES, POINTS = 3, 64


def match(queries, instances, change=None, costs=None):
    """The matched queries of a random image, and their instances, in one layer.

    Args:
        change: of the outputs.
        costs: in the place of the matcher's.
    """
    [outputs], [target] = random_layers(1, queries, CLASSES), random_targets([instances], CLASSES)
    matcher = make_criterion(CLASSES, POINTS).matcher
    if change is not None:
        change(outputs)
    if costs is not None:
        matcher.costs = lambda *args: costs[None, None]
    [found] = matcher([outputs], [target], [seeded()])
    return torch.from_numpy(found.queries[0]), torch.from_numpy(found.instances[0])


@pytest.mark.parametrize("entry", ["pred_masks", "pred_logits"])
def test_diverged_queries_lose_instead_of_raising(entry):
    for value in (float("nan"), float("inf"), float("-inf")):
        queries, instances = match(5, 3, lambda out, v=value: out[entry][0, :2].fill_(v))
        assert instances.tolist() == [0, 1, 2]
        assert set(queries.tolist()) == {2, 3, 4}


def test_a_cost_far_below_zero_does_not_hide_the_differences_of_the_others():
    """The sums of huge logits cancel to anything; 1e30 swallows ordinary costs even in float64."""
    for seed in range(5):
        costs = torch.rand(4, 3, generator=seeded(seed))
        costs[0] = -1e30
        queries, instances = match(4, 3, costs=costs)
        assert instances.tolist() == [0, 1, 2]
        cheapest = min(
            sum(costs[q, n].item() for q, n in zip(order, range(3), strict=True) if q)
            for order in itertools.permutations(range(4), 3)
            if 0 in order
        )
        others = queries != 0
        assert others.sum() == 2
        assert costs[queries, instances][others].sum().item() == pytest.approx(cheapest)
