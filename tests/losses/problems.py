"""A criterion with Mask2Former's settings, and random outputs and targets for it."""

import torch
from seeds import seeded

from s4m_d2.losses import HungarianMatcher, SetCriterion

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}


def make_criterion(num_classes, num_points, **changes):
    costs = {"class_cost": 2.0, "mask_cost": 5.0, "dice_cost": 5.0}
    options = {
        "num_classes": num_classes,
        "matcher": HungarianMatcher(**costs, num_points=num_points),
        "loss_weights": WEIGHTS,
        "no_object_weight": 0.1,
        "num_points": num_points,
        "oversample_ratio": 3.0,
        "importance_ratio": 0.75,
    }
    return SetCriterion(**options | changes)


def random_layers(batch, queries, classes, count=1, seed=0, *, size=(8, 12), scale=4.0):
    """Outputs of ``count`` layers."""
    rng = seeded(seed)
    return [
        {
            "pred_logits": torch.randn(batch, queries, classes + 1, generator=rng),
            "pred_masks": torch.randn(batch, queries, *size, generator=rng) * scale,
        }
        for _ in range(count)
    ]


def random_targets(counts, classes, seed=100, *, size=(16, 24)):
    """So many instances of each image; masks of random pixels, few or many."""
    found = []
    for number, count in enumerate(counts):
        rng = seeded(seed + number)
        labels = torch.randint(classes, (count,), generator=rng)
        masks = torch.rand(count, *size, generator=rng) < torch.rand(1, generator=rng)
        found.append({"labels": labels, "masks": masks})
    return found
