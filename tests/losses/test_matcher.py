"""Hungarian matching."""

import itertools

import numpy as np
import pytest
import torch

from s4m_d2.losses import HungarianMatcher
from s4m_d2.losses.mask_losses import draw_points

WEIGHTS = {"class_cost": 2.0, "mask_cost": 5.0, "dice_cost": 5.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_matcher(num_points=64, **weights):
    return HungarianMatcher(num_points=num_points, **{**WEIGHTS, **weights})


def random_image(queries, instances, *, classes=3, seed=0):
    rng = generator(seed)
    outputs = {
        "pred_logits": torch.randn(1, queries, classes + 1, generator=rng),
        "pred_masks": torch.randn(1, queries, 6, 8, generator=rng) * 3,
    }
    target = {
        "labels": torch.randint(classes, (instances,), generator=rng),
        "masks": torch.rand(instances, 12, 16, generator=rng) > 0.5,
    }
    return outputs, target


def literal_bilinear(image, x, y):
    """Value of a 2-d array at pixel coordinates, zero outside."""
    value = 0.0
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column]
    return value


def literal_cost(outputs, target, points):
    """The cost matrix in double precision, point by point."""

    def sample(masks):
        height, width = masks.shape[1:]
        return np.array(
            [
                [literal_bilinear(m, x * width - 0.5, y * height - 0.5) for x, y in points]
                for m in masks.double().numpy()
            ]
        )

    logits, truth = sample(outputs["pred_masks"][0]), sample(target["masks"])
    classes = np.exp(outputs["pred_logits"][0].double().numpy())
    classes /= classes.sum(1, keepdims=True)
    cost = np.zeros((len(logits), len(truth)))
    for q, n in np.ndindex(cost.shape):
        x, t = logits[q], truth[n]
        p = 1 / (1 + np.exp(-x))
        bce = np.mean(-t * np.log(p) - (1 - t) * np.log(1 - p))
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        cost[q, n] = 5 * bce + 5 * dice - 2 * classes[q, target["labels"][n]]
    return cost


def test_costs_equal_a_literal_computation():
    outputs, target = random_image(4, 3)
    matcher = make_matcher(num_points=9)
    points = draw_points(1, 9, generator=generator(5), device=torch.device("cpu"))[0].tolist()
    cost = matcher.cost(outputs["pred_logits"][0], outputs["pred_masks"][0], target, generator(5))
    expected = torch.from_numpy(literal_cost(outputs, target, points)).float()
    torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("queries", "instances"), [(5, 3), (4, 4), (2, 4), (3, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_assignment_is_the_cheapest_of_all(queries, instances, seed):
    outputs, target = random_image(queries, instances, seed=seed)
    matcher = make_matcher()
    cost = matcher.cost(
        outputs["pred_logits"][0], outputs["pred_masks"][0], target, generator(seed)
    )
    [(found_queries, found_instances)] = matcher(outputs, [target], [generator(seed)])
    size = min(queries, instances)
    cheapest = min(
        sum(cost[q, n].item() for q, n in zip(chosen, order, strict=True))
        for chosen in itertools.combinations(range(queries), size)
        for order in itertools.permutations(range(instances), size)
    )
    assert cost[found_queries, found_instances].sum().item() == pytest.approx(cheapest, rel=1e-5)
    assert len(set(found_queries.tolist())) == size
    assert found_instances.tolist() == sorted(set(found_instances.tolist()))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"mask_cost": 0.0, "dice_cost": 0.0}, [0]),  # query 0 has the class
        ({"class_cost": 0.0}, [1]),  # query 1 has the mask
    ],
)
def test_each_cost_decides_where_the_others_are_off(weights, expected):
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4] = True
    logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])  # (class 0, no object)
    right = torch.where(mask, 9.0, -9.0)
    outputs = {"pred_logits": logits, "pred_masks": torch.stack([-right, right], dim=1)}
    target = {"labels": torch.tensor([0]), "masks": mask}
    [(queries, _)] = make_matcher(**weights)(outputs, [target], [generator()])
    assert queries.tolist() == expected


def test_matches_of_an_image_do_not_depend_on_the_batch():
    first, target_1 = random_image(6, 4, seed=1)
    second, target_2 = random_image(6, 2, seed=2)
    matcher = make_matcher(num_points=3)
    both = {key: torch.cat([first[key], second[key]]) for key in first}
    together = matcher(both, [target_1, target_2], [generator(1), generator(2)])
    alone = [
        *matcher(first, [target_1], [generator(1)]),
        *matcher(second, [target_2], [generator(2)]),
    ]
    for (queries, instances), (queries_alone, instances_alone) in zip(together, alone, strict=True):
        assert torch.equal(queries, queries_alone) and torch.equal(instances, instances_alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("entry", ["pred_masks", "pred_logits"])
def test_diverged_queries_lose_instead_of_raising(entry, value):
    outputs, target = random_image(5, 3)
    outputs[entry][0, :2] = value
    [(queries, instances)] = make_matcher()(outputs, [target], [generator()])
    assert instances.tolist() == [0, 1, 2]
    assert set(queries.tolist()) == {2, 3, 4}


def test_all_queries_diverged_still_gives_a_one_to_one_assignment():
    outputs, target = random_image(5, 3)
    outputs["pred_masks"].fill_(float("nan"))
    [(queries, instances)] = make_matcher()(outputs, [target], [generator()])
    assert len(set(queries.tolist())) == 3 and instances.tolist() == [0, 1, 2]


def test_image_without_instances_matches_nothing():
    outputs, target = random_image(5, 0)
    [(queries, instances)] = make_matcher()(outputs, [target])
    assert queries.shape == instances.shape == (0,) and queries.dtype == torch.int64
