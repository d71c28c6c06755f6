"""Mask2Former's set-prediction loss L_sup: classes of all queries, masks of the matched ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor, nn

from s4m_d2.errors import ConfigError
from s4m_d2.losses.mask_losses import (
    dice_loss,
    sample_chosen,
    sample_each,
    sigmoid_ce_loss,
    uncertain_points,
)
from s4m_d2.losses.matcher import HungarianMatcher, ImageMatches
from s4m_d2.transfers import to_device


@dataclass(frozen=True)
class _BatchSizes:
    """Divisors that turn the sums of one process into its part of the means over all processes.

    Attributes:
        num_masks: 0-dim; instances of all images divided by the number of processes, at least 1.
        class_weight: 0-dim; class weights of all queries of a layer, divided likewise.
    """

    num_masks: Tensor
    class_weight: Tensor


@dataclass(frozen=True)
class _Indices:
    """The matches as tensors on the device.

    Attributes:
        classes: (L, B, Q) int64, the target class of each query of each layer.
        queries: (L, M) int64, matched queries of all images, numbered through the batch.
        instances: for each image the instances to be sampled, once if all layers match the same
            ones, else layer after layer; None: all in their order.
    """

    classes: Tensor
    queries: Tensor
    instances: list[Tensor | None]


class SetCriterion(nn.Module):
    """Weighted losses of every supervised layer.

    Each loss is a weighted mean over the batch of all processes: the mean of the processes' losses,
    whose gradient DDP computes, is the loss of the same images in one process. The mask losses are
    Mask2Former's, and divide by at least one mask per process. Mask2Former's class loss is a mean
    per process; a process without instances then weights "no object" too much.

    Args:
        num_classes: object classes K, without "no object".
        matcher: assigns queries to instances.
        loss_weights: weights of ``loss_ce``, ``loss_mask`` and ``loss_dice``, the same for all
            layers.
        no_object_weight: weight of "no object" in the cross-entropy, relative to a class.
        num_points: points per mask.
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
        self.empty_weight: Tensor
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
        outputs: dict[str, Any],
        targets: Sequence[dict[str, Tensor]],
        generators: Sequence[torch.Generator | None] | None = None,
    ) -> dict[str, Tensor]:
        """Compute all losses, in float32. Synchronizes once, in the matcher.

        Args:
            outputs: ``pred_logits`` (B, Q, K + 1), ``pred_masks`` (B, Q, h, w) logits of the padded
                batch, and optionally ``aux_outputs``, a list of dicts with the same two entries.
            targets: for each image ``labels`` (N,) int64 and ``masks`` (N, H, W) of the padded
                batch. N may be 0.
            generators: one for each image; None: torch's default. The draws for an image do not
                depend on the rest of the batch: first the points of the matching, layer by layer,
                then those of the losses, mask by mask of each layer; the last layer comes first.

        Returns:
            weighted 0-dim losses: ``loss_ce``, ``loss_mask``, ``loss_dice``, and the same with the
            suffix ``_i`` for entry i of ``aux_outputs``.

        Raises:
            InputError: if a label is none of the K classes.
        """
        layers = [outputs]
        if self.deep_supervision:
            layers += outputs.get("aux_outputs", [])
        device = outputs["pred_logits"].device
        with torch.autocast(device_type=device.type, enabled=False):
            matches = self.matcher(layers, targets, generators)
            sizes = self._batch_sizes(matches, outputs["pred_logits"].shape[1])
            indices = self._indices(matches, targets, outputs["pred_logits"])
            losses = {
                "loss_ce": self._class_losses(layers, indices.classes) / sizes.class_weight,
                **self._mask_losses(layers, targets, matches, indices, sizes, generators),
            }
        suffixes = ["", *(f"_{index}" for index in range(len(layers) - 1))]
        return {
            name + suffix: loss * self.loss_weights[name]
            for name, of_layers in losses.items()
            for suffix, loss in zip(suffixes, of_layers.unbind(), strict=True)
        }

    def _batch_sizes(self, matches: Sequence[ImageMatches], num_queries: int) -> _BatchSizes:
        """Divisors for this process' share of the batch, from one all-reduce."""
        instances = sum(match.num_instances for match in matches)
        matched = sum(map(len, matches))  # an object class weighs 1
        unmatched = len(matches) * num_queries - matched
        counts = to_device([instances, matched], self.empty_weight.device, torch.float32)
        counts[1] += unmatched * self.empty_weight[-1]
        world_size = comm.get_world_size()
        if world_size > 1:
            torch.distributed.all_reduce(counts)
        num_masks, class_weight = counts.unbind()
        return _BatchSizes((num_masks / world_size).clamp(min=1), class_weight / world_size)

    def _indices(
        self,
        matches: Sequence[ImageMatches],
        targets: Sequence[dict[str, Tensor]],
        logits: Tensor,
    ) -> _Indices:
        """One copy to the device."""
        num_layers, num_queries = len(matches[0].queries), logits.shape[1]
        classes = np.full((num_layers, len(matches), num_queries), self.num_classes)
        for image, match in enumerate(matches):
            np.put_along_axis(classes[:, image], match.queries, match.labels, axis=1)
        queries = np.concatenate(
            [match.queries + image * num_queries for image, match in enumerate(matches)], axis=1
        )
        wanted = [
            _wanted(match.instances, len(target["labels"]))
            for match, target in zip(matches, targets, strict=True)
        ]
        parts = [classes.ravel(), queries.ravel(), *(part for part in wanted if part is not None)]
        moved = to_device(np.concatenate(parts), logits.device).split([len(p) for p in parts])
        instances = iter(moved[2:])
        return _Indices(
            moved[0].view(classes.shape),
            moved[1].view(queries.shape),
            [None if part is None else next(instances) for part in wanted],
        )

    def _class_losses(self, layers: Sequence[dict[str, Tensor]], classes: Tensor) -> Tensor:
        """(L,) sums of class-weighted cross-entropies."""
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        each = F.cross_entropy(
            logits.flatten(0, 2), classes.flatten(), self.empty_weight, reduction="none"
        )
        return each.view(len(layers), -1).sum(1)

    def _mask_losses(
        self,
        layers: Sequence[dict[str, Tensor]],
        targets: Sequence[dict[str, Tensor]],
        matches: Sequence[ImageMatches],
        indices: _Indices,
        sizes: _BatchSizes,
        generators: Sequence[torch.Generator | None] | None,
    ) -> dict[str, Tensor]:
        """(L,) of each loss. Images are taken one by one, all layers of each together."""
        matched = [
            layer["pred_masks"].flatten(0, 1)[queries]
            for layer, queries in zip(layers, indices.queries.unbind(), strict=True)
        ]
        counts = [len(match) for match in matches]
        if not any(counts):  # zero, but part of the graph: every parameter gets a gradient
            nothing = torch.stack([masks.float().sum() for masks in matched])
            return {"loss_mask": nothing, "loss_dice": nothing}
        images = zip(
            zip(*(masks.split(counts) for masks in matched), strict=True),
            (target["masks"] for target in targets),
            indices.instances,
            generators or [None] * len(targets),
            strict=True,
        )
        losses = [
            self._image_mask_losses(*image)
            for image, count in zip(images, counts, strict=True)
            if count
        ]
        mask, dice = torch.cat(losses, dim=2).sum(2) / sizes.num_masks
        return {"loss_mask": mask, "loss_dice": dice}

    def _image_mask_losses(
        self,
        masks: tuple[Tensor, ...],
        truth: Tensor,
        instances: Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """(2, L, M) BCE and dice of one image's matched masks, (M, h, w) in each layer."""
        logits = torch.cat(masks).float()
        points = uncertain_points(
            logits,
            num_points=self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_ratio=self.importance_ratio,
            generator=generator,
        )
        labels = _read_truth(truth, instances, points.unflatten(0, (len(masks), -1)))
        point_logits = sample_each(logits, points)
        losses = torch.stack(
            [sigmoid_ce_loss(point_logits, labels), dice_loss(point_logits, labels)]
        )
        return losses.unflatten(1, (len(masks), -1))


def _wanted(instances: np.ndarray, count: int) -> np.ndarray | None:
    """See :attr:`_Indices.instances`; of (L, M) matched instances out of ``count``."""
    if not (instances == instances[0]).all():
        return instances.ravel()
    return None if instances.shape[1] == count else instances[0]


def _read_truth(masks: Tensor, instances: Tensor | None, points: Tensor) -> Tensor:
    """(L * M, P) values of instances at the points (L, M, P, 2) of each layer.

    An instance that all layers match is read at the points of all of them at once.
    """
    num_layers, matched, num_points = points.shape[:3]
    together = num_layers if instances is None or len(instances) == matched else 1
    grouped = points.unflatten(0, (-1, together)).transpose(1, 2)  # (groups, M, together, P, 2)
    values = sample_chosen(masks, instances, grouped.flatten(2, 3).flatten(0, 1))
    values = values.view(-1, matched, together, num_points)
    return values.transpose(1, 2).flatten(0, 2)


def _check_sampling(num_points: int, oversample_ratio: float, importance_ratio: float) -> None:
    for key, value, valid, range_ in (
        ("TRAIN_NUM_POINTS", num_points, num_points >= 1, ">= 1"),
        ("OVERSAMPLE_RATIO", oversample_ratio, oversample_ratio >= 1, ">= 1"),
        ("IMPORTANCE_SAMPLE_RATIO", importance_ratio, 0 <= importance_ratio <= 1, "in [0, 1]"),
    ):
        if not valid:
            raise ConfigError(f"MODEL.MASK_FORMER.{key} must be {range_}, got {value}")
