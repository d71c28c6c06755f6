"""Hungarian matching."""

import itertools

import pytest
import torch
from problems import make_criterion, random_layers, random_targets
from seeds import generators, seeded

from s4m_d2.losses import HungarianMatcher

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


def test_the_order_of_images_and_instances_does_not_matter_to_the_matches():
    """An image beside one with more instances, or fewer, finds what it finds alone."""
    counts, classes, depth = (1, 4, 0, 8), 3, 3
    layers, targets = random_layers(4, 5, classes, depth), random_targets(counts, classes)
    find = make_criterion(classes, 40).matcher
    together = find(layers, targets, generators(4))
    for image, (target, rng) in enumerate(zip(targets, generators(4), strict=True)):
        alone = [{k: v[image : image + 1] for k, v in layer.items()} for layer in layers]
        order = torch.arange(counts[image]).flip(0)
        [found] = find(alone, [{k: v[order] for k, v in target.items()}], [rng])
        assert found.num_instances == counts[image]
        for layer in range(depth):
            mine = zip(
                together[image].queries[layer], together[image].instances[layer], strict=True
            )
            again = zip(found.queries[layer], order[found.instances[layer]].tolist(), strict=True)
            assert sorted(mine) == sorted(again)
