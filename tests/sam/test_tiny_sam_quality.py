"""The packaged tiny SAM segments held-out toyscapes scenes, asked through the backend."""

from __future__ import annotations

import numpy as np
import torch
from sam_cases import config
from toyscapes_scene import render_scene

from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.adaptation import draw_clicks

SCENES = 16
SEED = 77  # neither a data set's nor the training's
MIN_AREA = 100  # px


def scenes():
    """(image (3, H, W), instance masks (N, H, W)) of each scene."""
    for index in range(SCENES):
        scene = render_scene(SEED, "test", index)
        ids, areas = np.unique(scene.instance_ids, return_counts=True)
        ids = ids[(ids >= 1000) & (areas >= MIN_AREA)]
        masks = torch.from_numpy(scene.instance_ids == ids[:, None, None])
        yield torch.from_numpy(scene.image).permute(2, 0, 1), masks


def test_clicks_give_good_masks_more_of_them_better_ones_and_their_rating_follows():
    backend = build_sam_backend(config(BACKEND="tiny_toyscapes", CHECKPOINT=""))
    rng = np.random.default_rng(0)
    ious, ratings = {1: [], 3: []}, {1: [], 3: []}
    for image, masks in scenes():
        size = tuple(image.shape[1:])
        encoded = backend.encode(image[None], [size])
        clicks = torch.from_numpy(np.stack([draw_clicks(mask.numpy(), 3, rng) for mask in masks]))
        for count in (1, 3):
            [output] = backend.prompt(encoded, [clicks[:, :count]])
            rating, best = output.iou_predictions.max(dim=1)
            predicted = backend.upscale(output.mask_logits[range(len(best)), best], size) > 0
            shared, either = predicted & masks, predicted | masks
            ious[count].append(shared.sum((1, 2)) / either.sum((1, 2)))
            ratings[count].append(rating)
    one, three, rating = map(torch.cat, (ious[1], ious[3], ratings[1]))
    assert len(three) > 60 and three.mean() >= 0.85 and three.mean() > one.mean() + 0.02
    assert np.corrcoef(one, rating)[0, 1] > 0.5
    assert (one - rating).abs().mean() < 0.15
