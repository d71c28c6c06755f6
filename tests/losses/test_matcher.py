"""Hungarian matching."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_losses import cost_matrix
from seeds import seeded

from s4m_d2.losses import HungarianMatcher
from s4m_d2.losses.mask_losses import draw_points

WEIGHTS = {"class_cost": 2.0, "mask_cost": 5.0, "dice_cost": 5.0}


def make_matcher(num_points=64, **weights):
    return HungarianMatcher(num_points=num_points, **{**WEIGHTS, **weights})


def random_image(queries, instances, *, classes=3, grid=(6, 8), seed=0):
    rng = seeded(seed)
    outputs = {
        "pred_logits": torch.randn(1, queries, classes + 1, generator=rng),
        "pred_masks": torch.randn(1, queries, *grid, generator=rng) * 3,
    }
    target = {
        "labels": torch.randint(classes, (instances,), generator=rng),
        "masks": torch.rand(instances, 12, 16, generator=rng) > 0.5,
    }
    return outputs, target


def match(matcher, outputs, targets, generators=None):
    """One layer: for each image the queries and the instances."""
    found = matcher([outputs], targets, generators)
    return [(torch.from_numpy(m.queries[0]), torch.from_numpy(m.instances[0])) for m in found]


@settings(max_examples=40)
@given(
    queries=st.integers(1, 6),
    instances=st.integers(0, 5),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    num_points=st.integers(1, 12),
    seed=st.integers(0, 2**20),
)
def test_costs_equal_literal_loops_in_double_precision(queries, instances, grid, num_points, seed):
    outputs, target = random_image(queries, instances, grid=grid, seed=seed)
    logits, masks = outputs["pred_logits"][0], outputs["pred_masks"][0]
    [[cost]] = make_matcher(num_points).costs([outputs], [target], [seeded(5)])
    points = draw_points(1, num_points, generator=seeded(5), device=torch.device("cpu"))[0]
    expected = cost_matrix(
        *(logits.double().numpy(), masks.double().numpy()),
        *(target["labels"].tolist(), target["masks"].double().numpy()),
        points.double().numpy(),
    )
    torch.testing.assert_close(cost.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("queries", "instances"), [(5, 3), (4, 4), (2, 4), (3, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_assignment_is_the_cheapest_of_all(queries, instances, seed):
    outputs, target = random_image(queries, instances, seed=seed)
    matcher = make_matcher()
    [[cost]] = matcher.costs([outputs], [target], [seeded(seed)])
    [(found_queries, found_instances)] = match(matcher, outputs, [target], [seeded(seed)])
    size = min(queries, instances)
    cheapest = min(
        sum(cost[q, n].item() for q, n in zip(chosen, order, strict=True))
        for chosen in itertools.combinations(range(queries), size)
        for order in itertools.permutations(range(instances), size)
    )
    assert cost[found_queries, found_instances].sum().item() == pytest.approx(cheapest, rel=1e-5)
    assert len(set(found_queries.tolist())) == size
    assert found_instances.tolist() == sorted(set(found_instances.tolist()))


@pytest.mark.parametrize("entry", ["pred_masks", "pred_logits"])
def test_diverged_queries_lose_instead_of_raising(entry):
    for value in (float("nan"), float("inf"), float("-inf")):
        outputs, target = random_image(5, 3)
        outputs[entry][0, :2] = value
        [(queries, instances)] = match(make_matcher(), outputs, [target], [seeded()])
        assert instances.tolist() == [0, 1, 2]
        assert set(queries.tolist()) == {2, 3, 4}


def test_a_cost_far_below_zero_does_not_hide_the_differences_of_the_others():
    """The sums of huge logits cancel to anything; 1e30 swallows ordinary costs even in float64."""
    outputs, target = random_image(4, 3)
    for seed in range(5):
        costs = torch.rand(4, 3, generator=seeded(seed))
        costs[0] = -1e30
        matcher = make_matcher()
        matcher.costs = lambda *args, costs=costs: costs[None, None]
        [(queries, instances)] = match(matcher, outputs, [target])
        assert instances.tolist() == [0, 1, 2]
        cheapest = min(
            sum(costs[q, n].item() for q, n in zip(order, range(3), strict=True) if q)
            for order in itertools.permutations(range(4), 3)
            if 0 in order
        )
        others = queries != 0
        assert others.sum() == 2
        assert costs[queries, instances][others].sum().item() == pytest.approx(cheapest)
