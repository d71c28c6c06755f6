"""The criterion and its matching: half precision, memory, and what is not finite or cannot be."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_criterion, random_layers, random_targets
from seeds import generators, seeded

from s4m_d2.errors import InputError
from s4m_d2.losses import mask_losses
from s4m_d2.losses.mask_losses import sample_each, uncertain_points

CLASSES, QUERIES, POINTS = 2, 4, 64
VALUES = (math.nan, math.inf, -math.inf, 3e38, -3e38)


def losses_of(layers, targets):
    outputs = {**layers[0], "aux_outputs": layers[1:]}
    return make_criterion(CLASSES, POINTS)(outputs, targets, generators(len(targets)))


def test_half_precision_outputs_give_float32_losses_under_autocast():
    [layer], targets = random_layers(1, QUERIES, CLASSES), random_targets([2], CLASSES)
    outputs = {key: value.bfloat16() for key, value in layer.items()}
    expected = losses_of([{key: value.float() for key, value in outputs.items()}], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of([outputs], targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


def test_without_instances_and_weights_the_losses_are_zero():
    [layer], targets = random_layers(1, QUERIES, CLASSES), random_targets([0], CLASSES)
    criterion = make_criterion(CLASSES, POINTS, no_object_weight=0.0)
    losses = criterion({**layer, "aux_outputs": []}, targets, generators(1))
    assert {loss.item() for loss in losses.values()} == {0.0}


@pytest.mark.parametrize("label", [-1, CLASSES, 99])
def test_a_label_that_is_no_class_is_refused(label):
    targets = random_targets([2, 3], CLASSES)
    targets[1]["labels"][2] = label
    [layer] = random_layers(2, QUERIES, CLASSES)
    with pytest.raises(InputError, match=rf"image 1 .* class id {label} .* 0\.\.1"):
        losses_of([layer], targets)


def test_reading_a_few_masks_at_a_time_changes_nothing(monkeypatch):
    problem = random_layers(1, QUERIES, CLASSES, 2), random_targets([2], CLASSES)
    expected = losses_of(*problem)
    monkeypatch.setitem(mask_losses.PIXELS_AT_ONCE, "cpu", 16 * 24)
    monkeypatch.setattr(mask_losses, "POINTS_AT_ONCE", 3 * POINTS)
    torch.testing.assert_close(losses_of(*problem), expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_a_number_is_chosen_first():
    """Few pixels that diverged must show in the loss."""
    mask = torch.randn(1, 40, 40, generator=seeded(0))
    mask[0, 3:5, 7:9] = math.nan
    points = uncertain_points(
        mask, num_points=4000, oversample_ratio=3.0, importance_ratio=1.0, generator=seeded(1)
    )
    expected = 3 * 4000 * 9 / 1600  # candidates in the 3 x 3 pixels between whose centers NaN lies
    assert sample_each(mask, points).isnan().sum().item() == pytest.approx(expected, rel=0.3)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    instances=st.lists(st.integers(0, QUERIES + 2), min_size=1, max_size=2),
    entry=st.sampled_from(["pred_logits", "pred_masks"]),
    layer=st.integers(0, 1),
    value=st.sampled_from(VALUES),
    share=st.sampled_from([0.05, 0.5, 1.0]),
)
def test_whatever_a_model_predicts_the_losses_are_computed(
    seed, instances, entry, layer, value, share
):
    layers = random_layers(len(instances), QUERIES, CLASSES, 2, seed)
    targets = random_targets(instances, CLASSES, seed)
    for each in layers:
        each["pred_logits"].requires_grad_()
        each["pred_masks"].requires_grad_()
    chosen = torch.rand(layers[layer][entry].shape, generator=seeded(seed))
    broken = layers[layer][entry].masked_fill(chosen < share, value)
    layers[layer] = {**layers[layer], entry: broken}
    losses = losses_of(layers, targets)
    sum(losses.values()).backward()
    suffix = "" if layer == 0 else "_0"
    spoiled = {f"{name}{suffix}" for name in ("loss_ce", "loss_mask", "loss_dice")}
    assert all(loss.isfinite() for name, loss in losses.items() if name not in spoiled)
    if entry == "pred_logits" and math.isnan(value) and bool((chosen < share).any()):
        assert losses[f"loss_ce{suffix}"].isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_masks_of_all_queries_that_are_not_finite_make_the_mask_losses_so(value):
    layers = random_layers(2, QUERIES, CLASSES, 2)
    targets = random_targets([3, 1], CLASSES)
    layers[0]["pred_masks"][1] = value
    losses = losses_of(layers, targets)
    assert not losses["loss_mask"].isfinite()
    assert losses["loss_ce"].isfinite() and losses["loss_mask_0"].isfinite()


def match(queries, instances, change=None, costs=None):
    """Matched queries and instances of a random image; ``costs``: in the place of the matcher's."""
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
