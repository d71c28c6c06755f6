"""Mask2Former's set-prediction loss L_sup: classes of all queries, masks of the matched ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor, nn

from s4m_d2.errors import ConfigError
from s4m_d2.losses.mask_losses import dice_loss, sample_each, sigmoid_ce_loss, uncertain_points
from s4m_d2.losses.matcher import HungarianMatcher

Matches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _BatchSizes:
    """What turns the sums and means of one process into its part of those of all processes.

    Attributes:
        num_masks: 0-dim; instances of all images, at least 1, divided by the number of processes.
        class_share: 0-dim; the class weights of this process' queries over the mean of all
            processes'. Exactly 1 in one process.
    """

    num_masks: Tensor
    class_share: Tensor


class SetCriterion(nn.Module):
    """Weighted losses of every supervised layer.

    Each loss is a weighted mean over the batch of all processes: the mean of the processes' losses,
    whose gradient DDP computes, is the loss of the same images in one process. Mask2Former divides
    so for the masks (by at least one mask a process, here one in all), but takes the class loss of
    each process alone, where a process without instances would push its queries towards "no object"
    many times as hard as the others.

    Args:
        num_classes: object classes K, without "no object".
        matcher: assigns queries to instances.
        loss_weights: weights of ``loss_ce``, ``loss_mask`` and ``loss_dice``, the same for all
            layers.
        no_object_weight: weight of "no object" in the cross-entropy, relative to a class.
        num_points: points a mask.
        oversample_ratio: candidates per point, >= 1.
        importance_ratio: share of the points that are the most uncertain candidates, in [0, 1].
        deep_supervision: supervise ``aux_outputs`` too.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        matcher: HungarianMatcher,
        loss_weights: dict[str, float],
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_ratio: float,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        _check_sampling(num_points, oversample_ratio, importance_ratio)
        self.num_classes = num_classes
        self.matcher = matcher
        self.loss_weights = dict(loss_weights)
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio
        self.deep_supervision = deep_supervision
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    @classmethod
    def from_config(cls, cfg) -> dict:
        former = cfg.MODEL.MASK_FORMER
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "matcher": HungarianMatcher(cfg),
            "loss_weights": {
                "loss_ce": former.CLASS_WEIGHT,
                "loss_mask": former.MASK_WEIGHT,
                "loss_dice": former.DICE_WEIGHT,
            },
            "no_object_weight": former.NO_OBJECT_WEIGHT,
            "num_points": former.TRAIN_NUM_POINTS,
            "oversample_ratio": former.OVERSAMPLE_RATIO,
            "importance_ratio": former.IMPORTANCE_SAMPLE_RATIO,
            "deep_supervision": former.DEEP_SUPERVISION,
        }

    def forward(
        self,
        outputs: dict[str, Tensor | list[dict[str, Tensor]]],
        targets: Sequence[dict[str, Tensor]],
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> dict[str, Tensor]:
        """Compute all losses, in float32.

        Args:
            outputs: ``pred_logits`` (B, Q, K + 1), ``pred_masks`` (B, Q, h, w) logits of the padded
                batch, and optionally ``aux_outputs``, a list of dicts with the same two entries.
            targets: for each image ``labels`` (N,) int64 and ``masks`` (N, H, W) of the padded
                batch. N may be 0.
            generators: one for each image, or None for torch's default one. What is drawn for an
                image does not depend on the rest of the batch.

        Returns:
            weighted 0-dim losses: ``loss_ce``, ``loss_mask``, ``loss_dice``, and the same with the
            suffix ``_i`` for entry i of ``aux_outputs``.
        """
        device = outputs["pred_logits"].device
        with torch.autocast(device_type=device.type, enabled=False):
            targets = [{**target, "masks": target["masks"].float()} for target in targets]
            sizes = self._batch_sizes(targets, outputs["pred_logits"].shape[1])
            losses = self._layer_losses(outputs, targets, sizes, generators)
            auxiliary_outputs = outputs.get("aux_outputs", []) if self.deep_supervision else []
            for index, auxiliary in enumerate(auxiliary_outputs):
                layer = self._layer_losses(auxiliary, targets, sizes, generators)
                losses.update({f"{name}_{index}": loss for name, loss in layer.items()})
        return losses

    def _batch_sizes(self, targets: Sequence[dict[str, Tensor]], num_queries: int) -> _BatchSizes:
        """Of this process' share of the batch, from one exchange between the processes."""
        instances = [len(target["labels"]) for target in targets]
        matched = sum(min(count, num_queries) for count in instances)  # an object class weighs 1
        unmatched = len(targets) * num_queries - matched
        own_weight = matched + unmatched * self.empty_weight[-1]
        counts = torch.stack([own_weight.new_tensor(float(sum(instances))), own_weight])
        world_size = comm.get_world_size()
        if world_size > 1:
            torch.distributed.all_reduce(counts)
        num_masks, class_weight = counts
        return _BatchSizes(
            num_masks.clamp(min=1) / world_size, own_weight * world_size / class_weight
        )

    def _layer_losses(
        self,
        outputs: dict[str, Tensor],
        targets: Sequence[dict[str, Tensor]],
        sizes: _BatchSizes,
        generators: Sequence[torch.Generator | None] | None,
    ) -> dict[str, Tensor]:
        matches = self.matcher(outputs, targets, generators)
        class_loss = self._class_loss(outputs["pred_logits"].float(), targets, matches)
        losses = {"loss_ce": class_loss * sizes.class_share}
        losses |= self._mask_losses(
            outputs["pred_masks"], targets, matches, sizes.num_masks, generators
        )
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    def _class_loss(
        self, logits: Tensor, targets: Sequence[dict[str, Tensor]], matches: Matches
    ) -> Tensor:
        """Class-weighted cross-entropy; unmatched queries should say "no object"."""
        classes = torch.full(
            logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device
        )
        for row, target, (queries, instances) in zip(classes, targets, matches, strict=True):
            row[queries] = target["labels"][instances]
        return F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)

    def _mask_losses(
        self,
        masks: Tensor,
        targets: Sequence[dict[str, Tensor]],
        matches: Matches,
        num_masks: Tensor,
        generators: Sequence[torch.Generator | None] | None,
    ) -> dict[str, Tensor]:
        counts = [len(queries) for queries, _ in matches]
        images = torch.repeat_interleave(torch.tensor(counts, device=masks.device))
        logits = masks[images, torch.cat([queries for queries, _ in matches])].float()
        points = uncertain_points(
            logits.detach(),
            counts,
            num_points=self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_ratio=self.importance_ratio,
            generators=generators,
        )
        labels = torch.cat(
            [
                sample_each(_select(target["masks"], instances), image_points)
                for target, (_, instances), image_points in zip(
                    targets, matches, points.split(counts), strict=True
                )
            ]
        )
        if not len(logits):  # zero, but part of the graph: every parameter gets a gradient
            return {"loss_mask": logits.sum(), "loss_dice": logits.sum()}
        point_logits = sample_each(logits, points)
        return {
            "loss_mask": sigmoid_ce_loss(point_logits, labels).sum() / num_masks,
            "loss_dice": dice_loss(point_logits, labels).sum() / num_masks,
        }


def _select(masks: Tensor, instances: Tensor) -> Tensor:
    """``masks[instances]`` without a copy where all are wanted (matches come in their order)."""
    return masks if len(instances) == len(masks) else masks[instances]


def _check_sampling(num_points: int, oversample_ratio: float, importance_ratio: float) -> None:
    for key, value, valid, range_ in (
        ("TRAIN_NUM_POINTS", num_points, num_points >= 1, ">= 1"),
        ("OVERSAMPLE_RATIO", oversample_ratio, oversample_ratio >= 1, ">= 1"),
        ("IMPORTANCE_SAMPLE_RATIO", importance_ratio, 0 <= importance_ratio <= 1, "in [0, 1]"),
    ):
        if not valid:
            raise ConfigError(f"MODEL.MASK_FORMER.{key} must be {range_}, got {value}")
