"""Held-out evaluation of the tiny SAM: IoU for one click and for three.

As SAM's authors do: one click is ambiguous, so the best-rated of three masks answers it; several
clicks are answered by the single mask (``multimask_output=False``).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tiny_sam_data import STUFF_OFFSET, ScenePool
from toyscapes_scene import INSTANCES_PER_LABEL

from s4m_d2.sam.decoder import predict_masks, transform_tokens
from s4m_d2.sam.tiny import IMAGE_SIDE

MIN_AREA = 100  # px: Cityscapes ignores smaller instances
TOUCH_REACH = 3  # px between an instance and a neighbor of its class that "touches" it


@dataclass
class ClickScores:
    """Mean IoUs at image resolution; ``touching``: instances with a touching same-class neighbor.

    three_clicks_rated, three_clicks_best: the best-rated and the truly best of three masks, for
    instances. quality_error: mean distance of the best-rated mask's predicted IoU from the true.
    """

    one_click: float
    three_clicks: float
    one_click_touching: float
    three_clicks_touching: float
    one_click_stuff: float
    three_clicks_stuff: float
    three_clicks_rated: float
    three_clicks_best: float
    quality_error: float
    instances: int
    touching: int


def touching_neighbors(regions: np.ndarray) -> set[int]:
    """Ids of the instances that a neighbor of their class touches."""
    found = set()
    ids = [int(i) for i in np.unique(regions) if INSTANCES_PER_LABEL <= i < STUFF_OFFSET]
    kernel = np.ones((2 * TOUCH_REACH - 1, 2 * TOUCH_REACH - 1), np.uint8)
    for i in ids:
        grown = cv2.dilate((regions == i).astype(np.uint8), kernel) > 0
        near = set(np.unique(regions[grown]).tolist()) - {i}
        if any(j // INSTANCES_PER_LABEL == i // INSTANCES_PER_LABEL for j in near if j in ids):
            found.add(i)
    return found


@torch.no_grad()
def evaluate_clicks(sam: torch.nn.Module, pool: ScenePool, seed: int) -> ClickScores:
    """Click uniformly inside each region of at least 100 px and compare the answer with it."""
    rows = []
    for number, (image, regions) in enumerate(zip(pool.images, pool.regions, strict=True)):
        rng = np.random.default_rng([seed, number])
        ids, areas = np.unique(regions, return_counts=True)
        ids = ids[(ids > 0) & (areas >= MIN_AREA)]
        if not len(ids):
            continue
        masks = torch.from_numpy(regions == ids[:, None, None])
        points = torch.from_numpy(np.stack([_uniform_clicks(m.numpy(), rng) for m in masks]))
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        embedding = sam.image_encoder(sam.preprocess(tensor))
        touching = touching_neighbors(regions)
        one, three = (_prompt(sam, embedding, points[:, :n], masks) for n in (1, 3))
        for k, region in enumerate(ids.tolist()):
            rows.append((region >= STUFF_OFFSET, region in touching, one[k, 1], *three[k]))
    stuff, touch, one, three, rated, best, error = map(np.array, zip(*rows, strict=True))
    stuff, touch = stuff.astype(bool), touch.astype(bool)
    return ClickScores(
        *(round(float(values[chosen].mean()), 4) for chosen in (~stuff, touch, stuff)
          for values in (one, three)),
        *(round(float(values[~stuff].mean()), 4) for values in (rated, best, error)),
        int((~stuff).sum()), int(touch.sum()),
    )  # fmt: skip


def _uniform_clicks(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    pick = rng.choice(len(ys), size=3, replace=False)
    return np.stack([xs[pick] + 0.5, ys[pick] + 0.5], axis=1).astype(np.float32)


def _prompt(
    sam: torch.nn.Module, embedding: torch.Tensor, points: torch.Tensor, masks: torch.Tensor
) -> np.ndarray:
    """(N, 4): IoU of the single mask, of the best-rated, of the best; error of the rating."""
    index, labels = torch.zeros(len(points), dtype=torch.long), torch.ones(points.shape[:2])
    hidden, features = transform_tokens(sam, embedding, index, points, labels.long())
    logits, rated = predict_masks(sam, hidden, features, slice(None))
    height, width = masks.shape[-2:]
    logits = F.interpolate(logits, (IMAGE_SIDE, IMAGE_SIDE), mode="bilinear", align_corners=False)
    predicted = logits[..., :height, :width] > 0
    target = masks[:, None]
    iou = (predicted & target).sum((2, 3)) / (predicted | target).sum((2, 3)).clamp(min=1)
    single, iou, rated = iou[:, :1], iou[:, 1:], rated[:, 1:]
    chosen = rated.argmax(dim=1, keepdim=True)
    own = iou.gather(1, chosen)
    error = (rated.gather(1, chosen) - own).abs()
    return torch.cat([single, own, iou.amax(dim=1, keepdim=True), error], dim=1).numpy()
