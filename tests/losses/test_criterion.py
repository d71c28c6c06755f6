"""The set-prediction loss: its weights, half precision, and options that cannot be."""

import pytest
import torch
from problems import WEIGHTS, make_criterion, random_layers, random_targets
from seeds import seeded

from s4m_d2.errors import ConfigError

CLASSES, QUERIES, POINTS = 2, 4, 128


def evaluate(outputs, **changes):
    criterion = make_criterion(CLASSES, changes.pop("num_points", POINTS), **changes)
    return criterion(outputs, random_targets([2], CLASSES), [seeded(0)])


def test_each_loss_is_proportional_to_its_own_weight():
    first, second = random_layers(1, QUERIES, CLASSES, 2)
    outputs = {**first, "aux_outputs": [second]}
    base = evaluate(outputs)
    for name in WEIGHTS:
        losses = evaluate(outputs, loss_weights={**WEIGHTS, name: 3 * WEIGHTS[name]})
        for key, loss in losses.items():
            torch.testing.assert_close(loss, (3 if key.startswith(name) else 1) * base[key])


def test_half_precision_outputs_give_float32_losses_under_autocast():
    [layer] = random_layers(1, QUERIES, CLASSES)
    outputs = {key: value.bfloat16() for key, value in layer.items()}
    expected = evaluate({key: value.float() for key, value in outputs.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = evaluate(outputs)
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
            evaluate(random_layers(1, QUERIES, CLASSES)[0], **{option: value})
