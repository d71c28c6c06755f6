"""Similarity maps of SAM and of models for a point (the paper's figure 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.losses.structural_distillation import StructuralDistillation
from s4m_d2.visualization import ColorScale, Panels, heat_map, mark_point
from s4m_d2.visualization.drawing import deepest_point, readable_scale

COSINE_STEP = 0.1  # the color scale, up to 1, starts at a multiple of it
CAPTION = "Ring: the point. SAM: its tokens, prompted there. Models: mask features on SAM's grid."
SAM = "SAM"

Sample = Mapping[str, Any]


def to_rgb(image: Tensor, order: str = "RGB") -> np.ndarray:
    """(3, H, W) uint8 in ``order`` → (H, W, 3) RGB array."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(array if order == "RGB" else array[:, :, ::-1])


@torch.no_grad()
def similarity_maps_at(
    sample: Sample,
    point: tuple[float, float],
    models: Mapping[str, nn.Module],
    distillation: StructuralDistillation,
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Compute the similarity maps that structural distillation compares, for one point.

    Args:
        sample: "image" (3, H, W) uint8 in the models' channel order.
        point: (x, y) in pixels of the image.
        models: at least one, in eval mode, with ``mask_features``.
        distillation: the loss, with its SAM.

    Returns:
        cosines between the point and the grid's cells with content, (rows, columns) float32, of
        SAM's tokens (SAM) and of each model by name; number of (rows, columns) of the content.

    Raises:
        InputError: the point is outside the image.
        ConfigError: a model has no ``mask_features``.
    """
    height, width = sample["image"].shape[-2:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise InputError(
            f"The point {point[0]:g} {point[1]:g} lies outside "
            f"{sample.get('file_name', 'the image')}, which is {width} x {height} px. Give x and y "
            "in pixels of the image."
        )
    place = (point[0] + 0.5) / width, (point[1] + 0.5) / height
    maps: dict[str, Tensor] = {}
    model: Any
    for name, model in models.items():
        if not hasattr(model, "mask_features"):
            raise ConfigError(
                f"{type(model).__name__} has no mask_features(batched_inputs), which similarity "
                "maps need: see S4MMaskFormer.mask_features, or leave 'similarity' out."
            )
        features, images, sizes = model.mask_features([sample])
        points = torch.tensor([[place]], device=images.device)
        own, sam, content = distillation.similarities(features, images, sizes, points)
        maps |= {SAM: sam, name: own}
    side = distillation.backend.grid_side
    rows, columns = int(content[0].any(1).sum()), int(content[0].any(0).sum())
    grids = {
        name: values.view(side, side)[: max(rows, 1), : max(columns, 1)].cpu().numpy()
        for name, values in maps.items()
    }
    across, down = distillation.backend.grid_scale((height, width))
    return grids, (down * side, across * side)


def similarity_panels(
    samples: Sequence[Sample],
    points: Sequence[tuple[float, float]],
    models: Mapping[str, nn.Module],
    distillation: StructuralDistillation,
    order: str,
) -> Panels:
    """Make panels of images with a point each, and the maps of SAM and of the models.

    Arguments are those of :func:`similarity_maps_at`, for several samples; ``order`` is "RGB" or
    "BGR".
    """
    pairs = zip(samples, points, strict=True)
    found = [similarity_maps_at(*pair, models, distillation) for pair in pairs]
    lowest = min(float(grid.min()) for grids, _ in found for grid in grids.values())
    low = min(math.floor(lowest / COSINE_STEP) * COSINE_STEP, 1.0 - COSINE_STEP)
    scale = ColorScale(low, 1.0, "cosine similarity")
    rows = []
    for sample, point, (grids, cells) in zip(samples, points, found, strict=True):
        image = to_rgb(sample["image"], order)
        factor = readable_scale(image)  # as other figures' pictures
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        colored = [heat_map(grid, image.shape[:2], scale, cells) for grid in grids.values()]
        place = [(value + 0.5) * factor for value in point]
        rows.append([mark_point(picture, place) for picture in (image, *colored)])
    return Panels(["image", SAM, *models], rows, scale=scale, caption=CAPTION)


def point_of(sample: Sample) -> tuple[float, float]:
    """Pixel (x, y) farthest inside the largest instance; without instances, the center."""
    height, width = sample["image"].shape[-2:]
    masks = sample["instances"].gt_masks.tensor
    if not len(masks):
        return (width // 2, height // 2)
    return deepest_point(masks[int(masks.flatten(1).sum(1).argmax())].cpu().numpy())
