"""Refinement with the real backend (random weights)."""

import pytest
import torch
import torch.nn.functional as F
from seeds import seeded

from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.sam.tiny import build_tiny_toyscapes
from s4m_d2.semi.mask_points import sample_mask_points
from s4m_d2.semi.pseudo_labels import select_pseudo_labels
from s4m_d2.semi.refinement import PointRefiner

SIZES = [(80, 160), (128, 72), (64, 128)]  # their contents fill whole cells of the grid
PADDED = (128, 160)
STRIDE = 4


@pytest.fixture(scope="module")
def backend() -> SegmentAnythingBackend:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sam = build_tiny_toyscapes()
        for value in sam.state_dict().values():
            value.add_(0.05 * torch.randn(value.shape, generator=seeded(1)))
    return SegmentAnythingBackend(sam)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth images with noise in the padding, which nobody may look at."""
    images = 255 * torch.rand(len(SIZES), 3, *PADDED, generator=seeded(2))
    for image, (height, width) in zip(images, SIZES, strict=True):
        coarse = torch.rand(1, 3, 4, 5, generator=seeded(height))
        image[:, :height, :width] = 255 * F.interpolate(coarse, (height, width), mode="bilinear")
    return images


def make_selections():
    generator = seeded(3)
    selections = []
    for index, (height, width) in enumerate(SIZES):
        coarse = 8 * torch.randn(4, 1, 3, 4, generator=generator)
        grid = (PADDED[0] // STRIDE, PADDED[1] // STRIDE)
        pred_logits = torch.tensor([[9.0, 0.0, 0.0]]).repeat(4, 1)
        if index == 1:  # the teacher finds nothing here
            pred_logits = pred_logits.flip(1)
        selections.append(
            select_pseudo_labels(
                pred_logits,
                F.interpolate(coarse, grid, mode="bilinear")[:, 0],
                content_size=(height / STRIDE, width / STRIDE),
                score_thresh=0.7,
                min_area=5.0,
            )
        )
    return selections


def test_refined_masks_are_sams_best_answer_to_the_clicks_of_each_mask(backend, images):
    selections = make_selections()
    refiner = PointRefiner(backend=backend, num_points=3)
    refined = refiner(selections, images, SIZES, [seeded(i) for i in range(3)])
    assert len(refined.labels[1]) == 0 and refined.labels[1].image_size == SIZES[1]
    for index in (0, 2):
        height, width = size = SIZES[index]
        selection, labels = selections[index], refined.labels[index]
        clicks, positive = sample_mask_points(selection, 3, seeded(index))
        encoded = backend.encode(images[index, None, :, :height, :width], [size])
        expected = []
        for click, flag in zip(clicks, positive, strict=True):
            [answer] = backend.prompt(encoded, [click[None]], [flag[None]])
            best = answer.iou_predictions[0].argmax()
            expected.append(backend.upscale(answer.mask_logits[:, best], size)[0] > 0)
        kept = [mask for mask in expected if mask.any()]
        assert len(labels) == len(selection.labels) >= len(kept) > 0
        for mask, wanted in zip(labels.masks, expected, strict=True):
            if wanted.any():
                assert (mask != wanted).float().mean() < 1e-3
