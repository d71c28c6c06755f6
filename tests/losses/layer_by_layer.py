"""The set-prediction loss in PyTorch as Mask2Former computes it: one layer and image at a time.

Nothing is shared with the package; all points are given.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

WEIGHTS = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
NO_OBJECT_WEIGHT = 0.1


def read(masks, points):
    """(N, H, W) at (N, P, 2) -> (N, P)."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0, :, 0]


def dice(logits, truth):
    p = logits.sigmoid()
    return 1 - (2 * (p * truth).sum(-1) + 1) / (p.sum(-1) + truth.sum(-1) + 1)


def bce(logits, truth):
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)


def match(logits, masks, target, points):
    """Queries and instances of one image; points (P, 2)."""
    x = read(masks, points.expand(len(masks), -1, -1))[:, None]
    truth = target["masks"]
    t = read(truth, points.expand(len(truth), -1, -1))[None]
    x, t = torch.broadcast_tensors(x, t)
    cost = 5 * bce(x, t) + 5 * dice(x, t) - 2 * logits.softmax(-1)[:, target["labels"]]
    queries, instances = map(torch.as_tensor, linear_sum_assignment(cost.detach().numpy()))
    order = instances.argsort()
    return queries[order], instances[order]


def mask_loss_terms(masks, truth, drawn, num_candidates, num_important):
    """BCE and dice of each matched mask; drawn (M, candidates + uniform ones, 2)."""
    candidates, uniform = drawn[:, :num_candidates], drawn[:, num_candidates:]
    chosen = (-read(masks.detach(), candidates).abs()).topk(num_important, dim=1).indices
    important = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    points = torch.cat([important, uniform], dim=1)
    x, t = read(masks, points), read(truth, points)
    return bce(x, t), dice(x, t)


def layer_losses(layer, targets, for_matching, for_losses, num_candidates, num_important):
    """Of one layer; for_matching and for_losses hold the points of each image."""
    class_weights = torch.ones(layer["pred_logits"].shape[2])
    class_weights[-1] = NO_OBJECT_WEIGHT
    classes = torch.full(layer["pred_logits"].shape[:2], len(class_weights) - 1)
    sums = {"loss_mask": 0.0, "loss_dice": 0.0}
    for image, target in enumerate(targets):
        if not len(target["labels"]):
            continue
        logits, masks = layer["pred_logits"][image], layer["pred_masks"][image]
        queries, instances = match(logits, masks, target, for_matching[image])
        classes[image, queries] = target["labels"][instances]
        terms = mask_loss_terms(
            *(masks[queries], target["masks"][instances], for_losses[image]),
            *(num_candidates, num_important),
        )
        for name, term in zip(sums, terms, strict=True):
            sums[name] = sums[name] + term.sum()
    num_masks = max(1, sum(len(target["labels"]) for target in targets))
    losses = {name: value / num_masks for name, value in sums.items()}
    losses["loss_ce"] = F.cross_entropy(
        layer["pred_logits"].flatten(0, 1), classes.flatten(), class_weights
    )
    return {name: WEIGHTS[name] * loss for name, loss in losses.items()}
