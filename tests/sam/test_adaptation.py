"""Fine-tuning a SAM on views of labeled images."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sam_cases import config

from s4m_d2.engine.labeling.sam_adaptation import random_view
from s4m_d2.sam import adaptation, build_sam_backend
from s4m_d2.sam.adaptation import FROZEN, adapt_sam, draw_clicks, mask_losses


def test_losses_and_ious_of_answers_by_hand():
    target = torch.zeros(1, 4, 4, dtype=torch.bool)
    target[0, :2] = True  # 8 of 16 px: balanced already
    right, half = torch.where(target, 20.0, -20.0)[0], torch.full((4, 4), -20.0)
    half[0] = 20.0
    losses, ious = mask_losses(torch.stack([right, half, torch.zeros(4, 4)])[None], target)
    torch.testing.assert_close(ious, torch.tensor([[1.0, 0.5, 0.0]]))
    # Cross-entropy: 4 of 16 px are wrong by 20; ln 2 where nothing is known. Dice plus one.
    expected = [0.0, 2 * 5.0 + 1 - 9 / 13, 2 * np.log(2) + 1 - 9 / 17]
    torch.testing.assert_close(losses, torch.tensor([expected], dtype=torch.float32))
    # A view that an instance fills.
    losses, ious = mask_losses(torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool))
    torch.testing.assert_close(losses.item(), 2 * np.log(2) + 1 - 17 / 25)
    assert ious.item() == 0


def test_clicks_are_different_pixels_of_the_mask():
    mask = np.zeros((6, 10), dtype=bool)
    mask[2, 3:7] = True
    points = draw_clicks(mask, 4, np.random.default_rng(0))
    assert sorted(map(tuple, np.rint(points * (10, 6) - 0.5))) == [(x, 2) for x in range(3, 7)]
    assert draw_clicks(mask, 9, np.random.default_rng(0)).shape == (9, 2)


@pytest.fixture
def red_record(tmp_path):
    """Two red squares, which are its masks, on blue."""
    from PIL import Image

    image = np.zeros((96, 128, 3), np.uint8)
    image[..., 2] = 255
    squares = [(10, 20, 40, 50), (70, 40, 110, 80)]
    for x0, y0, x1, y1 in squares:
        image[y0:y1, x0:x1] = (255, 0, 0)
    path = tmp_path / "red.png"
    Image.fromarray(image).save(path)
    annotations = [
        {"bbox": [x0, y0, x1, y1], "bbox_mode": 0, "category_id": 0,
         "segmentation": [[float(x) for x in (x0, y0, x1, y0, x1, y1, x0, y1)]]}
        for x0, y0, x1, y1 in squares
    ]  # fmt: skip
    return {"file_name": str(path), "height": 96, "width": 128, "annotations": annotations}


@pytest.mark.parametrize("tile", [0, 40])
def test_masks_lie_on_what_they_are_of_in_every_view(red_record, tile):
    rng, shapes = np.random.default_rng(1), set()
    for _ in range(20):
        image, masks = random_view([red_record], tile, 64, rng)
        shapes.add(tuple(image.shape))
        assert max(image.shape[1:]) == 64 and masks.shape[1:] == image.shape[1:]
        red = (image[0] > 127) & (image[2] < 128)
        assert (red != masks.any(dim=0)).float().mean() < 0.03
    assert ((3, 64, 48) in shapes) == (tile == 0)  # the whole image, turned


def loss_on(sam, view):
    encoded = sam.encode(view[0][None], [tuple(view[0].shape[1:])])
    rng = np.random.default_rng(2)
    points = torch.from_numpy(np.stack([draw_clicks(mask.numpy(), 1, rng) for mask in view[1]]))
    [found] = sam.prompt(encoded, [points])
    side = found.mask_logits.shape[2:]
    target = torch.nn.functional.interpolate(view[1].float()[None], side, mode="area")[0] > 0.5
    return mask_losses(found.mask_logits, target)[0].amin(dim=1).mean().item()


def changed_by_training(sam, view, batches):
    """Names of the parameters that a few iterations on a square view change; the loss falls."""
    before = {name: value.clone() for name, value in sam.sam.state_dict().items()}
    first = loss_on(sam, view)
    rng = np.random.default_rng(0)
    adapt_sam(sam, batches, iterations=6, clicks=1, rng=rng)
    assert loss_on(sam, view) < first
    assert not any(parameter.requires_grad for parameter in sam.sam.parameters())
    return {name for name, value in sam.sam.state_dict().items() if (value != before[name]).any()}


def test_of_a_small_encoder_all_but_imagenets_part_learns(red_record):
    view = random_view([red_record], 90, 256, np.random.default_rng(0))
    backend = build_sam_backend(config(BACKEND="tiny", CHECKPOINT=""))
    changed = changed_by_training(backend, view, itertools.repeat([view]))
    learned = {"image_encoder.transformer.", "image_encoder.lateral.", "mask_decoder."}
    assert all(any(name.startswith(part) for name in changed) for part in learned)
    frozen = {n for n in backend.sam.state_dict() if n.startswith(f"image_encoder.{FROZEN}")}
    assert frozen and not frozen & changed


def test_a_large_encoder_stays_and_reads_few_batches(backend, red_record, monkeypatch):
    monkeypatch.setattr(adaptation, "SMALL_ENCODER", 0)
    monkeypatch.setattr(adaptation, "CACHED_BATCHES", 2)
    sam = type(backend)(copy.deepcopy(backend.sam))
    view = random_view([red_record], 90, sam.image_side, np.random.default_rng(0))
    batches = iter([[view]] * 3)
    changed = changed_by_training(sam, view, batches)
    assert len(list(batches)) == 1
    encoders = ("image_encoder", "vision_encoder")
    assert changed and not any(name.startswith(encoders) for name in changed)
