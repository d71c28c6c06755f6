"""Structural distillation: the teacher learns SAM's feature similarities (paper, section 3.2).

``S4M.DISTILL.NAME`` is looked up in DISTILLATION_REGISTRY, whose entries are called as
``entry(cfg, backend)`` and return a loss like :class:`StructuralDistillation`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from fvcore.common.registry import Registry
from torch import Generator, Tensor

from s4m_d2.errors import registered, require
from s4m_d2.layers import cell_centers
from s4m_d2.transfers import to_device

DISTILLATION_REGISTRY = Registry("DISTILLATION")
DISTILLATION_REGISTRY.__doc__ = """Losses ``(cfg, backend) -> loss`` that distill SAM's features."""
NORM_EPSILON = 1e-8  # smallest product of two norms in a cosine

ImageSizes = Sequence[tuple[int, int]]


def build_distillation(cfg, backend):
    """Build the loss selected by S4M.DISTILL.NAME."""
    entry = registered(DISTILLATION_REGISTRY, "S4M.DISTILL.NAME", cfg.S4M.DISTILL.NAME)
    return entry(cfg, backend)


@DISTILLATION_REGISTRY.register()
class StructuralDistillation:
    """Huber loss between two maps of cosine similarities, SAM's and the teacher's.

    For each query point p_i, SAM is prompted with p_i alone as a positive click; C_SAM[i, j] is the
    cosine between its prompt-conditioned feature at p_i and at grid cell j. C_T[i, j] is the same
    of the teacher's mask features, resized bilinearly to that grid. The loss is the mean over
    images of the mean of Huber(C_SAM - C_T) over all i and all cells j that hold image content
    (0 for an image too thin to fill a cell).

    Features are sampled bilinearly between the centers of cells with content, so that padding has
    no effect. SAM's features have no gradient. Everything is computed in float32, also under
    autocast.

    Args:
        backend: a :class:`~s4m_d2.sam.backend.SamBackend`.
        weight: factor of the loss.
        num_points: query points per image.
        foreground_fraction: share of them drawn from the ground-truth masks (rounded).
        huber_delta: difference at which the loss changes from quadratic to linear.
        max_prompts: prompts whose features (C, S, S) are in memory at once.
    """

    @configurable
    def __init__(
        self,
        *,
        backend,
        weight: float = 1.0,
        num_points: int = 128,
        foreground_fraction: float = 0.5,
        huber_delta: float = 1.0,
        max_prompts: int = 128,
    ) -> None:
        share = foreground_fraction
        require("S4M.DISTILL.NUM_POINTS", num_points, num_points >= 1, "1 or more")
        require("S4M.DISTILL.FOREGROUND_FRACTION", share, 0 <= share <= 1, "a number in [0, 1]")
        require("S4M.DISTILL.HUBER_DELTA", huber_delta, huber_delta > 0, "more than 0")
        self.backend = backend
        self.weight = weight
        self.num_points = num_points
        self.num_foreground = round(foreground_fraction * num_points)
        self.huber_delta = huber_delta
        self.max_prompts = max_prompts

    @classmethod
    def from_config(cls, cfg, backend) -> dict:
        distill = cfg.S4M.DISTILL
        return {
            "backend": backend,
            "weight": distill.WEIGHT,
            "num_points": distill.NUM_POINTS,
            "foreground_fraction": distill.FOREGROUND_FRACTION,
            "huber_delta": distill.HUBER_DELTA,
            "max_prompts": cfg.S4M.SAM.MAX_PROMPTS,
        }

    def __call__(
        self,
        mask_features: Tensor,
        images: Tensor,
        image_sizes: ImageSizes,
        masks: Sequence[Tensor],
        generators: Sequence[Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the weighted loss of a batch.

        Args:
            mask_features: (B, C, h, w) of the padded batch, with gradients.
            images: (B, 3, H, W) RGB, 0..255, padded at the bottom and right.
            image_sizes: (H, W) of the contents.
            masks: for each image (N, H, W) bool ground-truth masks, in the padded frame or cropped
                to the content; N may be 0.
            generators: one for each image, on the device of ``images``; None: PyTorch's own.

        Returns:
            {"loss_sd": 0-dim float32 tensor}.
        """
        counts = self.num_points, self.num_foreground
        sources: Sequence[Generator | None] = generators or [None] * len(masks)
        points = [
            sample_query_points(mask, size, *counts, generator, images.device)
            for mask, size, generator in zip(masks, image_sizes, sources, strict=True)
        ]
        query = torch.stack(points)
        similarity, target, content = self.similarities(mask_features, images, image_sizes, query)
        huber = F.huber_loss(similarity, target, reduction="none", delta=self.huber_delta)
        cells = content.flatten(1).float()
        loss = (huber.mean(dim=1) * cells).sum(dim=1) / cells.sum(dim=1).clamp_min(1)
        return {"loss_sd": self.weight * loss.mean()}

    def similarities(
        self, mask_features: Tensor, images: Tensor, image_sizes: ImageSizes, points: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the two maps that the loss compares, for given query points.

        Args:
            points: (B, P, 2) query points (x, y), normalized to the contents; the others are as for
                the loss.

        Returns:
            C_T, with gradients, and C_SAM, both (B, P, S*S) float32, rows of the grid one after
            another; (B, S, S) bool: the cells that hold image content.
        """
        scales = [self.backend.grid_scale(size) for size in image_sizes]  # (x, y)
        scale = to_device(scales, images.device, torch.float32)
        content = torch.stack([self.backend.content_mask(size) for size in image_sizes])
        content = to_device(content, images.device)
        cells = torch.stack([content.any(dim=1).sum(dim=1), content.any(dim=2).sum(dim=1)], dim=-1)
        # At the center of the last cell at most: bilinear sampling reads no cell beyond it.
        last = (cells - 0.5) / self.backend.grid_side
        anchors = torch.minimum(points * scale[:, None], last[:, None])
        target = self._sam_similarity(images, image_sizes, points, anchors)
        resized = self._resize_to_grid(mask_features, images, image_sizes, scale)
        return similarity_maps(resized, anchors), target, content

    @torch.no_grad()
    def _sam_similarity(
        self, images: Tensor, image_sizes: ImageSizes, query: Tensor, anchors: Tensor
    ) -> Tensor:
        """(B, P, S*S) cosines of SAM; each chunk's features are reduced before the next."""
        encoded = self.backend.encode(images, list(image_sizes))
        chunk = max(1, self.max_prompts // len(images))
        maps = []
        for points, places in zip(query.split(chunk, 1), anchors.split(chunk, 1), strict=True):
            features = self.backend.prompted_features(encoded, list(points))
            pairs = zip(features, places[:, :, None], strict=True)
            maps.append(torch.stack([similarity_maps(*of_image)[:, 0] for of_image in pairs]))
        return torch.cat(maps, dim=1)

    def _resize_to_grid(
        self, mask_features: Tensor, images: Tensor, image_sizes: ImageSizes, scale: Tensor
    ) -> Tensor:
        """(B, C, S, S) mask features, float32, sampled at the centers of the grid's cells."""
        side = self.backend.grid_side
        padded, total = (np.array(t.shape[:1:-1]) for t in (images, mask_features))
        shown = np.array(image_sizes)[:, ::-1]
        cells = -(-shown * total // padded)  # rounded up: they hold some content
        known = np.stack([shown / padded, (cells - 0.5) / total])
        share, last = to_device(known, images.device, torch.float32).unbind()
        where = cell_centers((side, side), images.device) * (share / scale)[:, None]
        resized = _read(mask_features.float(), torch.minimum(where, last[:, None]))
        return resized.unflatten(2, (side, side))


def sample_query_points(
    masks: Tensor,
    image_size: tuple[int, int],
    num_points: int,
    num_foreground: int,
    generator: Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(P, 2) query points (x, y), normalized to the content of ``image_size`` (H, W).

    The first ``num_foreground`` are in distinct pixels of the union of ``masks`` (N, H', W'), drawn
    uniformly; the position within the pixel is uniform too. The others, and those for which the
    union has too few pixels, are uniform over the content.
    """
    height, width = image_size
    union = to_device(masks[:, :height, :width], device).any(dim=0).flatten()
    uniform = torch.rand((num_points, 2), generator=generator, device=device)
    keys = torch.rand(height * width, generator=generator, device=device)
    keys, index = keys.masked_fill(~union, -1.0).topk(min(num_foreground, len(keys)))
    head, rest = uniform.split([len(keys), num_points - len(keys)])
    x, y = head.unbind(dim=1)
    inside = torch.stack([(index % width + x) / width, (index // width + y) / height], dim=1)
    return torch.cat([torch.where(keys[:, None] >= 0, inside, head), rest])


def similarity_maps(maps: Tensor, anchors: Tensor) -> Tensor:
    """Cosine between the features at ``anchors`` and in every cell.

    maps: (N, C, S, S); anchors: (N, P, 2), normalized to the grid. Returns (N, P, S*S), float32.
    """
    with torch.autocast(maps.device.type, enabled=False):
        features, chosen = maps.float().flatten(2), _read(maps.float(), anchors)
        dots = chosen.transpose(1, 2) @ features
        norms = chosen.norm(dim=1)[:, :, None] * features.norm(dim=1)[:, None]
        return dots / norms.clamp_min(NORM_EPSILON)


def _read(maps: Tensor, points: Tensor) -> Tensor:
    """(N, C, P) bilinear values of (N, C, h, w) maps at (N, P, 2) points, normalized to them."""
    grid = 2 * points[:, :, None] - 1
    values = F.grid_sample(maps, grid, "bilinear", padding_mode="border", align_corners=False)
    return values.squeeze(-1)
