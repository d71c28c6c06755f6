"""Refinement and structural distillation with the real backend (random weights)."""

import pytest
import torch
import torch.nn.functional as F

from s4m_d2.losses.structural_distillation import StructuralDistillation, sample_query_points
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.sam.tiny import build_tiny_toyscapes
from s4m_d2.semi.pseudo_labels import select_pseudo_labels
from s4m_d2.semi.refinement import PointRefiner, sample_mask_points

SIZES = [(80, 160), (128, 72), (64, 128)]  # their contents fill whole cells of the grid
PADDED = (128, 160)
STRIDE = 4


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def backend() -> SegmentAnythingBackend:
    sam = build_tiny_toyscapes()
    with torch.no_grad():
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


def test_distillation_prompts_sam_where_the_points_lie(backend, images):
    """Each point by itself, computed from the backend's answer to that point alone."""
    features = torch.randn(3, 8, PADDED[0] // STRIDE, PADDED[1] // STRIDE, generator=seeded(4))
    features.requires_grad_()
    masks = [torch.zeros(n, *PADDED, dtype=torch.bool) for n in (2, 0, 1)]
    masks[0][:, 20:60, 30:90] = True
    masks[2][:, 10:30, 5:50] = True
    loss_fn = StructuralDistillation(backend=backend, num_points=2, max_prompts=3)
    loss = loss_fn(features, images, SIZES, masks, [seeded(i) for i in range(3)])["loss_sd"]

    expected = []
    side = backend.grid_side
    for index, size in enumerate(SIZES):
        content = features[index, None, :, : size[0] // STRIDE, : size[1] // STRIDE]
        rows = round(backend.grid_scale(size)[1] * side)
        columns = round(backend.grid_scale(size)[0] * side)
        teacher = F.interpolate(content, (rows, columns), mode="bilinear", align_corners=False)
        encoded = backend.encode(images[index, None], [size])
        for point in sample_query_points(masks[index], size, 2, 1, seeded(index)):
            [answer] = backend.prompt(encoded, [point[None, None]], features=True)
            maps = answer.features[:, :, :rows, :columns], teacher
            cosines = []
            for values in maps:
                place = (2 * point - 1).view(1, 1, 1, 2)
                read = F.grid_sample(values, place, padding_mode="border", align_corners=False)
                cosines.append(F.cosine_similarity(read, values))
            expected.append(F.huber_loss(*cosines))
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-3, atol=1e-5)

    loss.backward()
    assert features.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in backend.sam.parameters())
