"""The set-prediction loss."""

import pytest
import torch

from s4m_d2.errors import ConfigError
from s4m_d2.losses import HungarianMatcher, SetCriterion

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
CLASSES, QUERIES, POINTS = 2, 4, 128


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_criterion(loss_weights=WEIGHTS, **overrides):
    matcher = HungarianMatcher(class_cost=2.0, mask_cost=5.0, dice_cost=5.0, num_points=POINTS)
    options = {
        "num_classes": CLASSES,
        "matcher": matcher,
        "loss_weights": loss_weights,
        "no_object_weight": 0.1,
        "num_points": POINTS,
        "oversample_ratio": 3.0,
        "importance_ratio": 0.75,
    }
    return SetCriterion(**{**options, **overrides})


def random_outputs(batch, seed=0, aux=0):
    rng = torch.Generator().manual_seed(seed)

    def layer():
        return {
            "pred_logits": torch.randn(batch, QUERIES, CLASSES + 1, generator=rng),
            "pred_masks": torch.randn(batch, QUERIES, 8, 8, generator=rng),
        }

    outputs = {**layer(), "aux_outputs": [layer() for _ in range(aux)]}
    for each in (outputs, *outputs["aux_outputs"]):
        for name in ("pred_logits", "pred_masks"):
            each[name].requires_grad_()
    return outputs


def random_target(instances, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {
        "labels": torch.randint(CLASSES, (instances,), generator=rng),
        "masks": torch.rand(instances, 16, 16, generator=rng) > 0.5,
    }


def test_each_loss_is_proportional_to_its_own_weight():
    outputs, targets = random_outputs(1, aux=1), [random_target(2)]
    base = make_criterion()(outputs, targets, generators(0))
    for name in WEIGHTS:
        heavier = {**WEIGHTS, name: 3 * WEIGHTS[name]}
        losses = make_criterion(heavier)(outputs, targets, generators(0))
        for key, loss in losses.items():
            factor = 3 if key.startswith(name) else 1
            torch.testing.assert_close(loss, factor * base[key])


def test_half_precision_outputs_give_float32_losses_under_autocast():
    outputs = {
        key: value.bfloat16() for key, value in random_outputs(1).items() if key != "aux_outputs"
    }
    full = {key: value.float() for key, value in outputs.items()}
    expected = make_criterion()(full, [random_target(2)], generators(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = make_criterion()(outputs, [random_target(2)], generators(0))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


def test_impossible_sampling_options_are_refused_by_key():
    for option, value, key in (
        ("num_points", 0, "TRAIN_NUM_POINTS"),
        ("oversample_ratio", 0.5, "OVERSAMPLE_RATIO"),
        ("importance_ratio", 1.5, "IMPORTANCE_SAMPLE_RATIO"),
    ):
        with pytest.raises(ConfigError, match=f"MODEL.MASK_FORMER.{key}"):
            make_criterion(**{option: value})
