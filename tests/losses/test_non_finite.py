"""Predictions that are not finite: never an exception, and the loss says so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import make_criterion, random_layers, random_targets
from seeds import generators, seeded

from s4m_d2.losses.mask_losses import sample_each, uncertain_points

CLASSES, QUERIES, POINTS = 2, 4, 16
VALUES = (math.nan, math.inf, -math.inf, 3e38, -3e38)


def problem(seed, instances):
    """A batch of one image for each entry of ``instances``, with one auxiliary layer."""
    layers = random_layers(len(instances), QUERIES, CLASSES, 2, seed)
    return layers, random_targets(instances, CLASSES, seed)


def losses_of(layers, targets):
    outputs = {**layers[0], "aux_outputs": layers[1:]}
    return make_criterion(CLASSES, POINTS)(outputs, targets, generators(len(targets)))


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
    layers, targets = problem(seed, instances)
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
    layers, targets = problem(0, [3, 1])
    layers[0]["pred_masks"][1] = value
    losses = losses_of(layers, targets)
    assert not losses["loss_mask"].isfinite()
    assert losses["loss_ce"].isfinite() and losses["loss_mask_0"].isfinite()
