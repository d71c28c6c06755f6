"""The straightforward form of structural distillation: image by image, all of it per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from s4m_d2.losses import StructuralDistillation
from s4m_d2.losses.structural_distillation import sample_query_points


class Distillation:
    """What ``loss`` computes, with its settings and its backend, and to be called as it is.

    The image of a prompt is repeated for each prompt and goes through the library's transformer,
    whose parts are all computed. The grid's content must end where a cell does.
    """

    def __init__(self, loss: StructuralDistillation) -> None:
        self._loss = loss

    def __call__(
        self,
        mask_features: Tensor,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        masks: Sequence[Tensor],
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        loss = self._loss
        with torch.no_grad():
            embeddings = loss.backend.encode(images, list(image_sizes)).embeddings
        losses = []
        for index, size in enumerate(image_sizes):
            points = sample_query_points(
                masks[index],
                size,
                loss.num_points,
                loss.num_foreground,
                generators[index],
                images.device,
            )
            content = loss.backend.content_mask(size)
            rows, columns = int(content.any(1).sum()), int(content.any(0).sum())
            with torch.no_grad():
                tokens = prompted_tokens(loss.backend, embeddings[index], size, points)
                cells = tokens[:, :, :rows, :columns].float()
                target = cosines(cells, points[:, None])[:, 0]
            resized = F.interpolate(
                mask_features[index, None].float(), (rows, columns), mode="bilinear"
            )
            similarity = cosines(resized, points[None])[0]
            losses.append(F.huber_loss(similarity, target, delta=loss.huber_delta))
        return {"loss_sd": loss.weight * torch.stack(losses).mean()}


def prompted_tokens(
    backend, embedding: Tensor, image_size: tuple[int, int], points: Tensor
) -> Tensor:
    """(P, C, S, S) tokens of an image (C, S, S) after each of P clicks, (x, y) in its content."""
    sam, count = backend.decoder, len(points)
    scale = torch.tensor(backend.grid_scale(image_size), device=points.device)
    clicks = (points * scale * backend.image_side - 0.5)[:, None]
    kinds = torch.ones(count, 1, dtype=torch.long, device=points.device)
    prompts, no_mask = sam.prompt_encoder(points=(clicks, kinds), boxes=None, masks=None)
    learned = torch.cat([sam.mask_decoder.iou_token.weight, sam.mask_decoder.mask_tokens.weight])
    tokens = torch.cat([learned.expand(count, -1, -1), prompts], dim=1)
    image = embedding[None].repeat_interleave(count, 0) + no_mask
    position = sam.prompt_encoder.get_dense_pe().repeat_interleave(count, 0)
    _, attended = sam.mask_decoder.transformer(image, position, tokens)
    return attended.transpose(1, 2).reshape(image.shape)


def cosines(maps: Tensor, points: Tensor) -> Tensor:
    """(N, P, h*w) of maps (N, C, h, w) at points (N, P, 2) with all of their cells."""
    chosen = F.grid_sample(maps, 2 * points[:, :, None] - 1, "bilinear", "border", False)
    chosen = F.normalize(chosen[..., 0], dim=1)
    return chosen.transpose(1, 2) @ F.normalize(maps.flatten(2), dim=1)
