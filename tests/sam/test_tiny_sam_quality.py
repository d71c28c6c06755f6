"""The packaged tiny SAM segments held-out toyscapes scenes, asked through the backend."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.sam.tiny import TOYSCAPES_WEIGHTS, build_tiny_toyscapes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

from toyscapes_scene import render_scene  # noqa: E402

SCENES = 16
SEED = 77  # neither a data set's nor the training's
MIN_AREA = 100  # px


@pytest.fixture(scope="module")
def scenes():
    """(image (3, H, W), instance masks (N, H, W)) of each scene."""
    result = []
    for index in range(SCENES):
        scene = render_scene(SEED, "test", index)
        ids, areas = np.unique(scene.instance_ids, return_counts=True)
        ids = ids[(ids >= 1000) & (areas >= MIN_AREA)]
        masks = torch.from_numpy(scene.instance_ids == ids[:, None, None])
        result.append((torch.from_numpy(scene.image).permute(2, 0, 1), masks))
    return result


@pytest.fixture(scope="module")
def answers(scenes):
    """By number of clicks: (IoU of the best-rated mask, its rating) over all instances."""
    backend = SegmentAnythingBackend(
        load_sam(build_tiny_toyscapes, TOYSCAPES_WEIGHTS, "tiny_toyscapes")
    )
    sizes = [tuple(image.shape[1:]) for image, _ in scenes]
    encoded = backend.encode(torch.stack([image for image, _ in scenes]), sizes)
    rng = np.random.default_rng(0)
    clicks = [torch.stack([_clicks(mask, rng) for mask in masks]) for _, masks in scenes]
    found = {}
    for count in (1, 3):
        outputs = backend.prompt(encoded, [points[:, :count] for points in clicks])
        ious, ratings = [], []
        for (_, masks), output, size in zip(scenes, outputs, sizes, strict=True):
            rating, best = output.iou_predictions.max(dim=1)
            chosen = output.mask_logits[torch.arange(len(best)), best]
            predicted = backend.upscale(chosen, size) > 0
            overlap = (predicted & masks).sum((1, 2)) / (predicted | masks).sum((1, 2))
            ious.append(overlap)
            ratings.append(rating)
        found[count] = torch.cat(ious), torch.cat(ratings)
    return found


def _clicks(mask: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(3, 2) points, uniform in the mask, normalized to [0, 1]."""
    rows, columns = np.nonzero(mask.numpy())
    pick = rng.choice(len(rows), size=3, replace=False)
    points = np.stack([columns[pick] + 0.5, rows[pick] + 0.5], axis=1) / mask.shape[::-1]
    return torch.from_numpy(points).float()


def test_clicks_give_good_masks_more_of_them_better_ones_and_their_rating_follows(answers):
    (one, rating), (three, _) = answers[1], answers[3]
    assert len(three) > 60 and three.mean() >= 0.85 and three.mean() > one.mean() + 0.02
    assert np.corrcoef(one, rating)[0, 1] > 0.5
    assert (one - rating).abs().mean() < 0.15
