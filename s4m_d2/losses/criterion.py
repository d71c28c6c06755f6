"""Mask2Former's set-prediction loss L_sup: classes of all queries, masks of the matched ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils import comm
from torch import Tensor, nn

from s4m_d2.errors import require
from s4m_d2.losses.mask_losses import (
    dice_loss,
    sample_chosen,
    sample_each,
    sigmoid_ce_loss,
    uncertain_points,
)
from s4m_d2.losses.matcher import Generators, HungarianMatcher, ImageMatches, Layers, Targets
from s4m_d2.structures import MAX_BYTE
from s4m_d2.transfers import to_device


@dataclass(frozen=True)
class _Indices:
    """The matches as tensors on the device."""

    classes: Tensor  # (L, B, Q) int64, the target class of each query of each layer
    queries: Tensor  # (L, M) int64, matched queries of all images, numbered through the batch
    # (M,) int64 of each image, which all layers match; (L * M,) if it has more than queries: layers
    # may match different ones
    instances: list[Tensor]
    weights: Tensor | None  # (L, M) of the instances that the queries match; None: 1


class SetCriterion(nn.Module):
    """Weighted losses of every supervised layer.

    Each loss is a weighted mean over the batch of all processes: the mean of the processes' losses,
    whose gradient DDP computes, is the loss of the same images in one process. The mask losses are
    Mask2Former's, and divide by at least one mask per process. Mask2Former's class loss is a mean
    per process; a process without instances then weights "no object" too much.

    Targets may have weights (not in Mask2Former). An instance's weighs its query's class loss and
    its mask losses, in these means too: at 0 its query is neither an object nor "no object".
    Doubts of pixels lower their weight in the mean cross-entropy of a mask over its points, not in
    its dice, which depends on the overlap of whole masks. Matching knows neither.

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
        key, is_share = "MODEL.MASK_FORMER", 0 <= importance_ratio <= 1
        require(f"{key}.TRAIN_NUM_POINTS", num_points, num_points >= 1, "1 or more")
        require(f"{key}.OVERSAMPLE_RATIO", oversample_ratio, oversample_ratio >= 1, "1 or more")
        require(f"{key}.IMPORTANCE_SAMPLE_RATIO", importance_ratio, is_share, "a number in [0, 1]")
        self.num_classes = num_classes
        self.matcher = matcher
        self.loss_weights = dict(loss_weights)
        ratios = {"oversample_ratio": oversample_ratio, "importance_ratio": importance_ratio}
        self.sampling: dict[str, Any] = {"num_points": num_points, **ratios}
        self.deep_supervision = deep_supervision
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.empty_weight: Tensor
        self.register_buffer("empty_weight", empty_weight)

    @classmethod
    def from_config(cls, cfg) -> dict:
        former = cfg.MODEL.MASK_FORMER
        ce, mask, dice = former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT
        points = former.TRAIN_NUM_POINTS
        return {
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "matcher": HungarianMatcher(
                class_cost=ce, mask_cost=mask, dice_cost=dice, num_points=points
            ),
            "loss_weights": {"loss_ce": ce, "loss_mask": mask, "loss_dice": dice},
            "no_object_weight": former.NO_OBJECT_WEIGHT,
            "num_points": points,
            "oversample_ratio": former.OVERSAMPLE_RATIO,
            "importance_ratio": former.IMPORTANCE_SAMPLE_RATIO,
            "deep_supervision": former.DEEP_SUPERVISION,
        }

    def forward(
        self, outputs: dict[str, Any], targets: Targets, generators: Generators = None
    ) -> dict[str, Tensor]:
        """Compute all losses, in float32. Synchronizes once, in the matcher.

        Args:
            outputs: ``pred_logits`` (B, Q, K + 1), ``pred_masks`` (B, Q, h, w) logits of the padded
                batch, and optionally ``aux_outputs``, a list of dicts with the same two entries.
            targets: for each image ``labels`` (N,) int64 and ``masks`` (N, H, W) of the padded
                batch. N may be 0. Optionally ``weights`` (N,) float, at least 0, of instances, and
                ``doubts`` (N, H, W) uint8: a pixel weighs 1 - doubt / 255.
            generators: one for each image; None: torch's default. The draws for an image do not
                depend on the rest of the batch: first the points of the matching, layer by layer,
                then those of the losses, mask by mask of each layer; the last layer comes first.

        Returns:
            weighted 0-dim losses: ``loss_ce``, ``loss_mask``, ``loss_dice``, and the same with the
            suffix ``_i`` for entry i of ``aux_outputs``. InputError: a label is none of K classes.
        """
        layers = [outputs]
        if self.deep_supervision:
            layers += outputs.get("aux_outputs", [])
        device = outputs["pred_logits"].device
        with torch.autocast(device_type=device.type, enabled=False):
            matches = self.matcher(layers, targets, generators)
            indices = self._indices(matches, targets, outputs["pred_logits"])
            num_masks, class_weight = self._divisors(targets, indices)
            mask, dice = self._mask_losses(layers, targets, indices, generators)
            losses = {
                "loss_ce": self._class_losses(layers, indices) / class_weight,
                "loss_mask": mask / num_masks,
                "loss_dice": dice / num_masks,
            }
        suffixes = ["", *(f"_{index}" for index in range(len(layers) - 1))]
        return {
            name + suffix: loss * self.loss_weights[name]
            for name, of_layers in losses.items()
            for suffix, loss in zip(suffixes, of_layers.unbind(), strict=True)
        }

    def _divisors(self, targets: Targets, indices: _Indices) -> tuple[Tensor, Tensor]:
        """The divisors that turn sums of this process into its part of the means over all.

        The number of masks, 0-dim, and the weights of all queries of a layer, (1,), or (L,) if
        targets have weights; both divided by the number of processes, masks at least 1.
        """
        instances = sum(len(target["labels"]) for target in targets)
        matched = indices.queries.shape[1]  # an object class weighs 1
        unmatched = indices.classes[0].numel() - matched
        if indices.weights is None:
            counts = to_device([instances, matched], self.empty_weight.device, torch.float32)
        else:
            total = torch.cat([target["weights"] for target in targets]).sum()
            counts = torch.cat([total[None], indices.weights.sum(1)])
        counts[1:] += unmatched * self.empty_weight[-1]
        world_size = comm.get_world_size()
        if world_size > 1:
            torch.distributed.all_reduce(counts)
        tiny = torch.finfo(counts.dtype).tiny  # where nothing has a weight
        return (counts[0] / world_size).clamp(min=1), (counts[1:] / world_size).clamp(min=tiny)

    def _indices(
        self, matches: Sequence[ImageMatches], targets: Targets, logits: Tensor
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
            match.instances[0] if len(match) == len(target["labels"]) else match.instances.ravel()
            for match, target in zip(matches, targets, strict=True)
        ]
        parts = [classes.ravel(), queries.ravel(), *wanted]
        moved = to_device(np.concatenate(parts), logits.device).split([len(p) for p in parts])
        of_layers, instances = moved[1].view(queries.shape), moved[2:]
        weights = None
        if "weights" in targets[0]:
            shape = num_layers, -1
            each = [target["weights"][i] for target, i in zip(targets, instances, strict=True)]
            pairs = zip(each, matches, strict=True)
            rows = [w.expand(shape) if len(w) == len(m) else w.view(shape) for w, m in pairs]
            weights = torch.cat(rows, dim=1)
        return _Indices(moved[0].view(classes.shape), of_layers, instances, weights)

    def _class_losses(self, layers: Layers, indices: _Indices) -> Tensor:
        """(L,) sums of weighted cross-entropies."""
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        each = F.cross_entropy(
            logits.flatten(0, 2), indices.classes.flatten(), self.empty_weight, reduction="none"
        ).view(len(layers), -1)
        if indices.weights is not None:
            each = each * torch.ones_like(each).scatter(1, indices.queries, indices.weights)
        return each.sum(1)

    def _mask_losses(
        self, layers: Layers, targets: Targets, indices: _Indices, generators: Generators
    ) -> Tensor:
        """(2, L) sums of BCE and dice. Images are taken one by one, all layers of each together."""
        matched = [
            layer["pred_masks"].flatten(0, 1)[queries]
            for layer, queries in zip(layers, indices.queries.unbind(), strict=True)
        ]
        num_queries = layers[0]["pred_masks"].shape[1]
        counts = [min(len(target["labels"]), num_queries) for target in targets]
        if not any(counts):  # zero, but part of the graph: every parameter gets a gradient
            return torch.stack([masks.float().sum() for masks in matched]).expand(2, -1)
        of_images = zip(*(masks.split(counts) for masks in matched), strict=True)
        sources = generators or [None] * len(targets)
        images = zip(of_images, targets, indices.instances, sources, strict=True)
        losses = [self._image_mask_losses(*image) for image in images if len(image[2])]
        each = torch.cat(losses, dim=2)
        return (each if indices.weights is None else each * indices.weights).sum(2)

    def _image_mask_losses(
        self,
        masks: tuple[Tensor, ...],
        target: dict[str, Tensor],
        instances: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """(2, L, M) BCE and dice of one image's matched masks, (M, h, w) in each layer."""
        logits = torch.cat(masks).float()
        points = uncertain_points(logits, generator=generator, **self.sampling)
        of_layers = points.unflatten(0, (len(masks), -1))
        labels = _read_truth(target["masks"], instances, of_layers)
        weights = None
        if "doubts" in target:
            weights = 1 - _read_truth(target["doubts"], instances, of_layers) / MAX_BYTE
        point_logits = sample_each(logits, points)
        losses = torch.stack(
            [sigmoid_ce_loss(point_logits, labels, weights), dice_loss(point_logits, labels)]
        )
        return losses.unflatten(1, (len(masks), -1))


def _read_truth(masks: Tensor, instances: Tensor, points: Tensor) -> Tensor:
    """(L * M, P) values of instances at the points (L, M, P, 2) of each layer.

    An instance that all layers match is read at the points of all of them at once.
    """
    num_layers, matched, num_points = points.shape[:3]
    together = num_layers if len(instances) == matched else 1
    grouped = points.unflatten(0, (-1, together)).transpose(1, 2)  # (groups, M, together, P, 2)
    values = sample_chosen(masks, instances, grouped.flatten(2, 3).flatten(0, 1))
    values = values.view(-1, matched, together, num_points)
    return values.transpose(1, 2).flatten(0, 2)
