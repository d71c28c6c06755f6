"""Hungarian matching of queries to instances (DETR, Mask2Former)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from s4m_d2.losses.mask_losses import (
    draw_points,
    pairwise_dice_loss,
    pairwise_sigmoid_ce_loss,
    sample_shared,
)

#: What a cost that is not finite counts as, and the bound of every cost's magnitude. Small enough
#: for the differences of ordinary costs to survive in float64.
WORST_COST = 1e6


class HungarianMatcher:
    """Finds the one-to-one assignment of queries to instances with the least total cost.

    The cost of a pair is ``class_cost · (-p(class)) + mask_cost · BCE + dice_cost · dice``, the
    mask terms on points that all queries and instances of an image share.

    Args:
        class_cost, mask_cost, dice_cost: weights, >= 0.
        num_points: points an image.
    """

    @configurable
    def __init__(
        self, *, class_cost: float, mask_cost: float, dice_cost: float, num_points: int
    ) -> None:
        self.class_cost = class_cost
        self.mask_cost = mask_cost
        self.dice_cost = dice_cost
        self.num_points = num_points

    @classmethod
    def from_config(cls, cfg) -> dict:
        former = cfg.MODEL.MASK_FORMER
        return {
            "class_cost": former.CLASS_WEIGHT,
            "mask_cost": former.MASK_WEIGHT,
            "dice_cost": former.DICE_WEIGHT,
            "num_points": former.TRAIN_NUM_POINTS,
        }

    @torch.no_grad()
    def __call__(
        self,
        outputs: dict[str, Tensor],
        targets: Sequence[dict[str, Tensor]],
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Match every image of a batch.

        Args:
            outputs: ``pred_logits`` (B, Q, K + 1) and ``pred_masks`` (B, Q, h, w) logits.
            targets: for each image ``labels`` (N,) int64 and ``masks`` (N, H, W), in the same
                frame as the predicted masks up to scale.
            generators: one for each image, or None for torch's default one.

        Returns:
            for each image two (min(Q, N),) int64 tensors: the queries, and the instances that they
            match, in ascending order.
        """
        generators = generators or [None] * len(targets)
        matches = []
        for logits, masks, target, generator in zip(
            outputs["pred_logits"], outputs["pred_masks"], targets, generators, strict=True
        ):
            cost = self.cost(logits.float(), masks, target, generator)
            matches.append(_assign(cost))
        return matches

    def cost(
        self,
        logits: Tensor,
        masks: Tensor,
        target: dict[str, Tensor],
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(Q, N) costs of one image: logits (Q, K + 1), masks (Q, h, w), one entry of targets."""
        points = draw_points(1, self.num_points, generator=generator, device=masks.device)[0]
        mask_logits = sample_shared(masks, points)
        mask_targets = sample_shared(target["masks"], points)
        probabilities = logits.softmax(-1)[:, target["labels"]]
        return (
            self.mask_cost * pairwise_sigmoid_ce_loss(mask_logits, mask_targets)
            + self.dice_cost * pairwise_dice_loss(mask_logits, mask_targets)
            - self.class_cost * probabilities
        )


def _assign(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and instances of the cheapest assignment; costs that are not finite lose.

    The matches then say nothing, but the losses of diverged predictions are still computed, and it
    is these that show that the step has to be skipped.
    """
    bounded = cost.double().nan_to_num(nan=WORST_COST, posinf=WORST_COST, neginf=WORST_COST)
    queries, instances = linear_sum_assignment(bounded.clamp(-WORST_COST, WORST_COST).cpu().numpy())
    order = instances.argsort()
    return (
        torch.as_tensor(queries[order], dtype=torch.int64, device=cost.device),
        torch.as_tensor(instances[order], dtype=torch.int64, device=cost.device),
    )
