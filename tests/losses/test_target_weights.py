"""Weights of instances and pixels in the criterion: by hand, and as means of the parts."""

import math

import pytest
import torch
import torch.nn.functional as F
from problems import WEIGHTS, make_criterion, random_layers, random_targets
from seeds import generators

from s4m_d2.losses.mask_losses import sigmoid_ce_loss

CLASSES, QUERIES, POINTS, LAYERS = 3, 5, 64, 3
NO_OBJECT = 0.1


def evaluate(targets, layers=None, criterion=None):
    layers = random_layers(len(targets), QUERIES, CLASSES, LAYERS) if layers is None else layers
    outputs = {**layers[0], "aux_outputs": layers[1:]}
    criterion = criterion or make_criterion(CLASSES, POINTS)
    return criterion(outputs, targets, generators(len(targets)))


def weighted(targets, weights):
    pairs = zip(targets, weights, strict=True)
    return [{**target, "weights": torch.tensor(of_image)} for target, of_image in pairs]


@pytest.mark.parametrize("counts", [(3, 0, 2), (QUERIES + 3, 1), (0, 0)])
def test_weights_of_one_are_no_weights(counts):
    targets = random_targets(counts, CLASSES)
    ones = [
        {
            **target,
            "weights": torch.ones(len(target["labels"])),
            "doubts": torch.zeros_like(target["masks"], dtype=torch.uint8),
        }
        for target in targets
    ]
    torch.testing.assert_close(evaluate(ones), evaluate(targets))


def test_a_label_of_weight_zero_has_no_gradient_and_no_share():
    """Only the other queries learn, and the other label as much as if it was alone."""
    [layer] = random_layers(1, QUERIES, CLASSES)
    [target] = random_targets([2], CLASSES)
    criterion = make_criterion(CLASSES, POINTS)
    [match] = criterion.matcher([layer], [target], generators(1))
    ignored, learned = match.queries[0]
    for tensor in layer.values():
        tensor.requires_grad_()
    losses = evaluate(weighted([target], [[0.0, 1.0]]), [layer])
    sum(losses.values()).backward()
    for tensor in layer.values():
        others = [q for q in range(QUERIES) if q not in (ignored, learned)]
        assert not tensor.grad[0, ignored].any() and tensor.grad[0, learned].any()
        assert tensor.grad[0, others].any() == (tensor is layer["pred_logits"])
    with torch.no_grad():
        classes = torch.full((QUERIES,), CLASSES)
        classes[learned] = target["labels"][1]
        left = [q for q in range(QUERIES) if q != ignored]
        mean = torch.tensor([*[1.0] * CLASSES, NO_OBJECT])
        expected = F.cross_entropy(layer["pred_logits"][0, left], classes[left], mean)
        torch.testing.assert_close(losses["loss_ce"].detach(), WEIGHTS["loss_ce"] * expected)


@pytest.mark.parametrize("weights", [(0.25, 1.5), (0.2, 0.3)])
def test_losses_are_weighted_means_over_labels(weights):
    """The draws for an image do not depend on the others, so that its part can be had alone."""
    targets = random_targets([1, 1], CLASSES)
    layers = random_layers(2, QUERIES, CLASSES, LAYERS)
    together = evaluate(weighted(targets, [[w] for w in weights]), layers)
    parts = []
    for i, target in enumerate(targets):
        own = [{key: value[i : i + 1] for key, value in layer.items()} for layer in layers]
        outputs = {**own[0], "aux_outputs": own[1:]}
        seeded = [generators(2)[i]]
        parts.append(
            make_criterion(CLASSES, POINTS)(outputs, weighted([target], [[weights[i]]]), seeded)
        )
    of_classes = [w + NO_OBJECT * (QUERIES - 1) for w in weights]
    for name, loss in together.items():
        first, second = (part[name] for part in parts)
        if name.startswith("loss_ce"):
            mean = (of_classes[0] * first + of_classes[1] * second) / sum(of_classes)
        else:  # alone, and together, they are divided by at least one
            alone = [max(w, 1.0) for w in weights]
            mean = (alone[0] * first + alone[1] * second) / max(sum(weights), 1.0)
        torch.testing.assert_close(loss, mean)


def test_pixels_weight_the_mean_cross_entropy():
    logits = torch.tensor([[0.0, math.log(3)]])  # of the truth 1, 0: log 2, log 4
    loss = sigmoid_ce_loss(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 3.0]]))
    assert loss.item() == pytest.approx((math.log(2) + 3 * math.log(4)) / 4)


def test_pixels_are_weighted_where_they_are():
    """With nearly all weight on the left half, what is predicted on the right hardly matters."""
    [target] = random_targets([2], CLASSES)
    doubts = torch.zeros_like(target["masks"], dtype=torch.uint8)
    doubts[:, :, 12:] = 254
    gradients = {}
    for name, its in (("plain", target), ("left", {**target, "doubts": doubts})):
        [layer] = random_layers(1, QUERIES, CLASSES)
        layer["pred_masks"].requires_grad_()
        losses = evaluate([its], [layer])
        losses["loss_mask"].backward()
        gradients[name] = layer["pred_masks"].grad.abs().sum((0, 1, 2)), losses["loss_dice"]
    (plain, dice), (left, same) = gradients["plain"], gradients["left"]
    torch.testing.assert_close(dice, same)
    assert left[:5].sum() > 1.5 * plain[:5].sum() and left[7:].sum() < 0.1 * plain[7:].sum()
