"""Mask2Former's set-prediction loss once more: literal loops in double precision.

Nothing here is shared with the package. Arrays are NumPy's; points are (x, y) in [0, 1].
"""

from dataclasses import dataclass, field
from math import exp, floor, log, log1p

import numpy as np
from scipy.optimize import linear_sum_assignment

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
NO_OBJECT_WEIGHT = 0.1


def bilinear(image, x, y):
    """Value of a 2-d array at a point: pixel (i, j) has its center at ((j + ½)/W, (i + ½)/H), and
    outside of the array lie zeros."""
    height, width = image.shape
    x, y = x * width - 0.5, y * height - 0.5
    value = 0.0
    for row in (floor(y), floor(y) + 1):
        for column in (floor(x), floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(y - row)) * (1 - abs(x - column)) * float(image[row, column])
    return value


def read(image, points):
    return [bilinear(image, float(x), float(y)) for x, y in points]


def sigmoid(x):
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))


def bce(logits, targets, weights=None):
    """Weighted mean of -t·log p - (1 - t)·log(1 - p), with -log p = log(1 + e^-x)."""
    total = 0.0
    weights = weights or [1.0] * len(logits)
    for x, t, weight in zip(logits, targets, weights, strict=True):
        softplus = max(x, 0.0) + log1p(exp(-abs(x)))  # log(1 + e^x), for large x too
        total += weight * (t * (softplus - x) + (1 - t) * softplus)
    return total / sum(weights)


def dice(logits, targets):
    """1 - (2·Σpt + 1) / (Σp + Σt + 1)."""
    overlap = total_p = total_t = 0.0
    for x, t in zip(logits, targets, strict=True):
        overlap += sigmoid(x) * t
        total_p += sigmoid(x)
        total_t += t
    return 1 - (2 * overlap + 1) / (total_p + total_t + 1)


def softmax(logits):
    largest = max(logits)
    powers = [exp(x - largest) for x in logits]
    return [power / sum(powers) for power in powers]


def cost_matrix(class_logits, mask_logits, labels, masks, points):
    """(Q, N): 5·BCE + 5·dice - 2·p(class), the mask terms at ``points`` (P, 2)."""
    cost = np.zeros((len(class_logits), len(labels)))
    for q, n in np.ndindex(cost.shape):
        x, t = read(mask_logits[q], points), read(masks[n], points)
        probability = softmax(class_logits[q].tolist())[labels[n]]
        cost[q, n] = 5 * bce(x, t) + 5 * dice(x, t) - 2 * probability
    return cost


def cheapest(cost):
    """Pairs (query, instance) of SciPy's Hungarian algorithm."""
    return list(zip(*linear_sum_assignment(cost), strict=True))


def loss_points(mask_logits, candidates, uniform, num_important):
    """The points of one mask: the candidates with the smallest |logit|, and uniform ones."""
    order = sorted(candidates, key=lambda point: abs(bilinear(mask_logits, *map(float, point))))
    return [*order[:num_important], *uniform]


@dataclass
class Target:
    """Instances of an image; a pixel weighs 1 - doubt / 255."""

    labels: list[int]
    masks: np.ndarray
    weights: list[float]
    doubts: np.ndarray


@dataclass
class Layer:
    """One supervised output: (B, Q, K + 1) class logits and (B, Q, h, w) mask logits; for each
    image, pairs (query, instance) and each pair's points."""

    logits: np.ndarray
    masks: np.ndarray
    matches: list[list[tuple[int, int]]]
    points: list[list] = field(default_factory=list)


def layer_losses(layer, targets, normalizer):
    """Weighted losses of one layer."""
    no_object = layer.logits.shape[2] - 1
    ce = ce_weight = mask_sum = dice_sum = 0.0
    images = zip(layer.logits, layer.masks, targets, layer.matches, layer.points, strict=True)
    for logits, mask_logits, target, matches, points in images:
        wanted = dict(matches)
        for query, row in enumerate(logits.tolist()):
            label, weight = no_object, NO_OBJECT_WEIGHT
            if query in wanted:
                label, weight = target.labels[wanted[query]], target.weights[wanted[query]]
            ce -= weight * log(softmax(row)[label])
            ce_weight += weight
        for (query, instance), its_points in zip(matches, points, strict=True):
            x, t = read(mask_logits[query], its_points), read(target.masks[instance], its_points)
            doubts = read(target.doubts[instance], its_points)
            mask_sum += target.weights[instance] * bce(x, t, [1 - d / 255 for d in doubts])
            dice_sum += target.weights[instance] * dice(x, t)
    losses = {"loss_ce": ce / ce_weight}
    losses |= {"loss_mask": mask_sum / normalizer, "loss_dice": dice_sum / normalizer}
    return {name: WEIGHTS[name] * loss for name, loss in losses.items()}


def criterion(layers, targets):
    """Losses of the last layer, first in ``layers``, and of the earlier ones with their number."""
    normalizer = max(sum(sum(target.weights) for target in targets), 1)
    losses = layer_losses(layers[0], targets, normalizer)
    for index, layer in enumerate(layers[1:]):
        for name, loss in layer_losses(layer, targets, normalizer).items():
            losses[f"{name}_{index}"] = loss
    return losses
