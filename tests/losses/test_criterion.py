"""The set-prediction loss: half precision, memory, and what cannot be."""

import pytest
import torch
from problems import make_criterion, random_layers, random_targets
from seeds import seeded

from s4m_d2.errors import InputError
from s4m_d2.losses import mask_losses

CLASSES, QUERIES, POINTS = 2, 4, 128


def evaluate(outputs, **changes):
    criterion = make_criterion(CLASSES, changes.pop("num_points", POINTS), **changes)
    return criterion(outputs, random_targets([2], CLASSES), [seeded(0)])


def test_half_precision_outputs_give_float32_losses_under_autocast():
    [layer] = random_layers(1, QUERIES, CLASSES)
    outputs = {key: value.bfloat16() for key, value in layer.items()}
    expected = evaluate({key: value.float() for key, value in outputs.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = evaluate(outputs)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name])


@pytest.mark.parametrize("label", [-1, CLASSES, 99])
def test_a_label_that_is_no_class_is_refused(label):
    targets = random_targets([2, 3], CLASSES)
    targets[1]["labels"][2] = label
    [layer] = random_layers(2, QUERIES, CLASSES)
    with pytest.raises(InputError, match=rf"image 1 .* class id {label} .* 0\.\.1"):
        make_criterion(CLASSES, POINTS)(layer, targets, [seeded(0), seeded(1)])


def test_reading_a_few_masks_at_a_time_changes_nothing(monkeypatch):
    first, second = random_layers(1, QUERIES, CLASSES, 2)
    outputs = {**first, "aux_outputs": [second]}
    expected = evaluate(outputs)
    monkeypatch.setitem(mask_losses.PIXELS_AT_ONCE, "cpu", 16 * 24)
    monkeypatch.setattr(mask_losses, "POINTS_AT_ONCE", 3 * POINTS)
    torch.testing.assert_close(evaluate(outputs), expected, rtol=1e-6, atol=1e-6)
