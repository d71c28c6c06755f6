"""Hungarian matching of queries to instances (DETR, Mask2Former)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.projects.point_rend.point_features import point_sample
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from s4m_d2.errors import InputError
from s4m_d2.losses.mask_losses import (
    draw_points,
    pairwise_dice_loss,
    pairwise_sigmoid_ce_loss,
    sample_shared,
)
from s4m_d2.transfers import to_host

#: Replaces costs that are not finite, and bounds all others; small enough to keep the differences
#: of ordinary costs in float64.
WORST_COST = 1e6

#: Of each supervised layer ``pred_logits`` (B, Q, K + 1) and ``pred_masks`` (B, Q, h, w), logits.
Layers = Sequence[dict[str, Tensor]]
#: Of each image ``labels`` (N,) int64 and ``masks`` (N, H, W), in the frame of the predicted masks
#: up to scale.
Targets = Sequence[dict[str, Tensor]]
#: One for each image, which draws the points of all layers; None: torch's default.
Generators = Sequence[torch.Generator | None] | None


@dataclass(frozen=True)
class ImageMatches:
    """The matches of one image with N instances in L layers, on the host; M = min(Q, N)."""

    queries: np.ndarray  #: (L, M) int64
    #: (L, M) int64 positions in the image's target that the queries match, ascending
    instances: np.ndarray
    labels: np.ndarray  #: (L, M) int64, the instances' classes

    def __len__(self) -> int:
        """M, in each layer."""
        return self.queries.shape[1]


@dataclass(kw_only=True)
class HungarianMatcher:
    """Finds the one-to-one assignment of queries to instances with the least total cost.

    The cost of a pair is ``class_cost · (-p(class)) + mask_cost · BCE + dice_cost · dice``. The
    mask terms use points that all queries and instances of an image share within a layer.

    Args:
        class_cost, mask_cost, dice_cost: weights, >= 0.
        num_points: points per image and layer.
    """

    class_cost: float
    mask_cost: float
    dice_cost: float
    num_points: int

    def __call__(
        self, layers: Layers, targets: Targets, generators: Generators = None
    ) -> list[ImageMatches]:
        """Match every image in every layer; returns each image's matches. Synchronizes once.

        InputError: a label is none of the K classes.
        """
        num_queries, num_labels = layers[0]["pred_logits"].shape[1:]
        counts = [len(target["labels"]) for target in targets]
        if not any(counts):
            nothing = np.zeros((len(layers), 0), dtype=np.int64)
            return [ImageMatches(nothing, nothing, nothing) for _ in targets]
        costs, labels = to_host(
            self.costs(layers, targets, generators),
            torch.cat([target["labels"] for target in targets]),
        )
        matches = []
        for image, label in enumerate(np.split(labels, np.cumsum(counts)[:-1])):
            wrong = label[(label < 0) | (label >= num_labels - 1)]
            if len(wrong):
                raise InputError(
                    f"target of image {image} of the batch: class id {wrong[0]} is out of range "
                    f"0..{num_labels - 2}; labels must have the classes of the model "
                    "(MODEL.SEM_SEG_HEAD.NUM_CLASSES)"
                )
            matches.append(_assign(costs[:, image, :num_queries], label))
        return matches

    @torch.no_grad()
    def costs(self, layers: Layers, targets: Targets, generators: Generators = None) -> Tensor:
        """(L, B, Q, N) float32 costs; N is the largest number of instances of an image.

        Entries beyond an image's own instances have no meaning.
        """
        device = layers[0]["pred_masks"].device
        sources = generators or [None] * len(targets)
        drawn = [draw_points(len(layers), self.num_points, each, device) for each in sources]
        points = torch.stack(drawn, dim=1)  # (L, B, P, 2)
        read = [
            sample_shared(target["masks"], its_points.flatten(0, 1))
            for target, its_points in zip(targets, points.unbind(1), strict=True)
        ]
        masks = pad_sequence(read, batch_first=True).unflatten(2, (len(layers), self.num_points))
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
        read_layers = zip(layers, masks.unbind(2), points, strict=True)
        return torch.stack([self._layer_costs(layer, labels, *its) for layer, *its in read_layers])

    def _layer_costs(
        self, layer: dict[str, Tensor], labels: Tensor, masks: Tensor, points: Tensor
    ) -> Tensor:
        """(B, Q, N); labels (B, N), and masks (B, N, P) read at points (B, P, 2)."""
        logits = point_sample(layer["pred_masks"].float(), points, align_corners=False)
        probabilities = layer["pred_logits"].float().softmax(-1)
        known = labels.clamp(0, probabilities.shape[2] - 1)  # the host refuses others
        classes = known[:, None].expand(-1, probabilities.shape[1], -1)
        return (
            self.mask_cost * pairwise_sigmoid_ce_loss(logits, masks)
            + self.dice_cost * pairwise_dice_loss(logits, masks)
            - self.class_cost * probabilities.gather(2, classes)
        )


def _assign(costs: np.ndarray, labels: np.ndarray) -> ImageMatches:
    """The cheapest assignment of an image in each layer, from (L, Q, N) costs and (N,) labels.

    Costs that are not finite count as WORST_COST. Matches of diverged predictions are arbitrary,
    but their losses must still be computed: they show that the step has to be skipped.
    """
    costs = costs[:, :, : len(labels)].astype(np.float64)
    bounded = np.where(np.isfinite(costs), costs, WORST_COST).clip(-WORST_COST, WORST_COST)
    pairs = np.array([linear_sum_assignment(cost) for cost in bounded], dtype=np.int64)
    order = pairs[:, 1:].argsort(axis=2)
    queries, instances = np.take_along_axis(pairs, order, axis=2).swapaxes(0, 1)
    return ImageMatches(queries, instances, labels[instances])
