"""The set-prediction loss."""

import math

import pytest
import torch

from s4m_d2.errors import ConfigError
from s4m_d2.losses import HungarianMatcher, SetCriterion

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
CLASSES, QUERIES, POINTS = 2, 4, 128
MASK = torch.zeros(1, 16, 16, dtype=torch.bool)
MASK[0, 4:12, 4:12] = True


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


def test_class_loss_by_hand():
    """One of two queries is matched: CE = (1·a + 0.1·b) / 1.1 with log-softmax a, b."""
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]])
    masks = torch.stack([torch.where(MASK[0], 9.0, -9.0), torch.where(MASK[0], -9.0, 9.0)])[None]
    target = {"labels": torch.tensor([0]), "masks": MASK}
    losses = make_criterion()({"pred_logits": logits, "pred_masks": masks}, [target], generators(0))
    matched = math.log(math.exp(2) + 1 + math.e) - 2  # class 0 of query 0
    unmatched = math.log(1 + math.exp(3) + 1) - 0  # "no object" of query 1
    expected = 2.0 * (matched + 0.1 * unmatched) / 1.1
    assert losses["loss_ce"].item() == pytest.approx(expected, rel=1e-6)


def test_right_undecided_and_wrong_masks_cost_ever_more():
    """Undecided logits (all zero) cost log 2 at every point, whatever the target."""
    target = {"labels": torch.tensor([0]), "masks": MASK}
    right = torch.where(MASK, 30.0, -30.0)[None]
    losses = [
        make_criterion(importance_ratio=0.0)(
            {"pred_logits": torch.zeros(1, 1, CLASSES + 1), "pred_masks": masks},
            [target],
            generators(0),
        )
        for masks in (right, torch.zeros_like(right), -right)
    ]
    assert losses[1]["loss_mask"].item() == pytest.approx(5 * math.log(2), rel=1e-5)
    assert losses[0]["loss_mask"] < 0.5 * losses[1]["loss_mask"]
    assert losses[2]["loss_mask"] > 10 * losses[1]["loss_mask"]
    dice = [loss["loss_dice"].item() / 5 for loss in losses]
    assert 0 <= dice[0] < 0.15 and 0.3 < dice[1] < 0.8 and 0.85 < dice[2] < 1


def test_each_loss_is_proportional_to_its_own_weight():
    outputs, targets = random_outputs(1, aux=1), [random_target(2)]
    base = make_criterion()(outputs, targets, generators(0))
    for name in WEIGHTS:
        heavier = {**WEIGHTS, name: 3 * WEIGHTS[name]}
        losses = make_criterion(heavier)(outputs, targets, generators(0))
        for key, loss in losses.items():
            factor = 3 if key.startswith(name) else 1
            torch.testing.assert_close(loss, factor * base[key])


@pytest.mark.parametrize("batch", [1, 2])
def test_images_without_instances_teach_no_object(batch):
    outputs = random_outputs(batch)
    targets = [random_target(0) for _ in range(batch)]
    losses = make_criterion()(outputs, targets, generators(*range(batch)))
    expected = -2.0 * outputs["pred_logits"].log_softmax(-1)[..., -1].mean()
    torch.testing.assert_close(losses["loss_ce"], expected)
    assert losses["loss_mask"] == 0 and losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert outputs["pred_logits"].grad.any()
    assert outputs["pred_masks"].grad is not None and not outputs["pred_masks"].grad.any()


def test_more_instances_than_queries_are_matched_as_far_as_queries_go():
    """The mask losses are those of the matched instances alone, spread over all instances."""
    outputs, target = random_outputs(1), random_target(QUERIES + 3)
    criterion = make_criterion()
    losses = criterion(outputs, [target], generators(0))
    [matches] = criterion.matcher([outputs], [target], generators(0))
    matched = torch.from_numpy(matches.instances[0])
    assert matched.tolist() != list(range(QUERIES))
    subset = {key: value[matched] for key, value in target.items()}
    alone = criterion(outputs, [subset], generators(0))
    torch.testing.assert_close(losses["loss_ce"], alone["loss_ce"])
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(losses[name] * (QUERIES + 3), alone[name] * QUERIES)


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


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("num_points", 0, "TRAIN_NUM_POINTS"),
        ("oversample_ratio", 0.5, "OVERSAMPLE_RATIO"),
        ("importance_ratio", 1.5, "IMPORTANCE_SAMPLE_RATIO"),
    ],
)
def test_impossible_sampling_options_are_refused_by_key(option, value, key):
    with pytest.raises(ConfigError, match=f"MODEL.MASK_FORMER.{key}"):
        make_criterion(**{option: value})
