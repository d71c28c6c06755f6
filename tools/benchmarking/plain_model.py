"""The straightforward forms of the model: one image, one layer, one feature map at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from s4m_d2.sam import EncodedImages, PromptOutput


def deformable_sampling(
    value: Tensor, level_sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable attention's look-up, level by level: read all points, then weigh and add.

    value (B, S, heads, C), locations (B, Q, heads, levels, points, 2), weights (B, Q, heads,
    levels, points) -> (B, Q, heads * C).
    """
    dtype = value.dtype
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    read, start = [], 0
    for level, (height, width) in enumerate(level_sizes):
        cells = value[:, start : start + height * width].float()
        start += height * width
        maps = cells.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = 2 * locations[:, :, :, level].float() - 1  # B, Q, heads, points, 2
        grid = grid.permute(0, 2, 1, 3, 4).reshape(batch * heads, queries, -1, 2)
        read.append(F.grid_sample(maps, grid, align_corners=False))
    sampled = torch.stack(read, dim=3)  # B·heads, C, Q, levels, points
    factors = weights.float().permute(0, 2, 1, 3, 4).flatten(0, 1)[:, None]
    mixed = (sampled * factors).sum(dim=(3, 4)).view(batch, heads * channels, queries)
    return mixed.transpose(1, 2).to(dtype)


class Matcher:
    """Hungarian matching of one image and one layer at a time, each with its own transfer.

    Args:
        class_cost, mask_cost, dice_cost: weights of the terms.
        num_points: points an image.
    """

    def __init__(
        self, class_cost: float, mask_cost: float, dice_cost: float, num_points: int
    ) -> None:
        self.class_cost = class_cost
        self.mask_cost = mask_cost
        self.dice_cost = dice_cost
        self.num_points = num_points

    @torch.no_grad()
    def __call__(
        self, layers: Sequence[dict], targets: Sequence[dict], generators: Sequence | None = None
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """For each image and layer the matched queries and instances, by instance.

        An image's generator draws the points of all layers.
        """
        matches = []
        for index, target in enumerate(targets):
            generator = generators[index] if generators else None
            device = target["masks"].device
            source = generator.device if generator is not None else device
            shape = (len(layers), self.num_points, 2)
            points = torch.rand(shape, generator=generator, device=source).to(device)
            found = []
            for layer, its_points in zip(layers, points, strict=True):
                logits, masks = layer["pred_logits"][index], layer["pred_masks"][index]
                cost = self.cost(logits, masks, target, its_points)
                queries, instances = linear_sum_assignment(cost.cpu().numpy())
                order = instances.argsort()
                found.append(
                    tuple(
                        torch.as_tensor(side[order], device=device) for side in (queries, instances)
                    )
                )
            matches.append(found)
        return matches

    def cost(self, logits: Tensor, masks: Tensor, target: dict, points: Tensor) -> Tensor:
        """(Q, N) costs at points (P, 2), the mask terms by the two sides of the cross-entropy."""
        grid = (2 * points - 1)[None, None]
        predicted = F.grid_sample(masks[None].float(), grid, align_corners=False)[0, :, 0]
        wanted = F.grid_sample(target["masks"][None].float(), grid, align_corners=False)[0, :, 0]
        inside = F.binary_cross_entropy_with_logits(
            predicted, torch.ones_like(predicted), reduction="none"
        )
        outside = F.binary_cross_entropy_with_logits(
            predicted, torch.zeros_like(predicted), reduction="none"
        )
        entropy = (inside @ wanted.T + outside @ (1 - wanted).T) / self.num_points
        shares = predicted.sigmoid()
        total = shares.sum(1)[:, None] + wanted.sum(1)[None]
        dice = 1 - (2 * shares @ wanted.T + 1) / (total + 1)
        likely = logits.float().softmax(-1)[:, target["labels"]]
        return self.mask_cost * entropy + self.dice_cost * dice - self.class_cost * likely


def encode_one_by_one(backend, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list:
    """SAM's image encoder, one image a pass."""
    return [
        backend.encode(image[None], [size]) for image, size in zip(images, image_sizes, strict=True)
    ]


class OneByOne:
    """A SAM that encodes one image a pass and answers the prompts of one image a pass."""

    def __init__(self, backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> EncodedImages:
        encoded = encode_one_by_one(self._backend, images, image_sizes)
        finer = zip(*(one.finer_maps for one in encoded), strict=True)
        return EncodedImages(
            torch.cat([one.embeddings for one in encoded]),
            [size for one in encoded for size in one.image_sizes],
            tuple(map(torch.cat, finer)),
        )

    def prompt(
        self, encoded: EncodedImages, points: Sequence, labels=None, **options: bool
    ) -> list[PromptOutput]:
        outputs = []
        for index, clicks in enumerate(points):
            kinds = [labels[index]] if labels is not None else None
            outputs += self._backend.prompt(encoded.select([index]), [clicks], kinds, **options)
        return outputs
