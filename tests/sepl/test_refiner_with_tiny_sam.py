"""SEPL as a refiner with the packaged tiny SAM on scenes of toyscapes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.sam.tiny import TOYSCAPES_WEIGHTS, build_tiny_toyscapes
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.sepl.refiner import SEPLRefiner
from s4m_d2.structures import PseudoLabels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets"))

from toyscapes_scene import render_scene  # noqa: E402

SIZE = (128, 256)
PADDED = (160, 288)
SCENES = (0, 1)
SETTINGS = AutomaticMaskSettings(points_per_side=8, pred_iou_thresh=0.6, stability_score_thresh=0.6)
MIN_AREA = 150  # px


@pytest.fixture(scope="module")
def refiner():
    backend = SegmentAnythingBackend(
        load_sam(build_tiny_toyscapes, TOYSCAPES_WEIGHTS, "tiny_toyscapes")
    )
    return SEPLRefiner(backend=backend, automatic_masks=AutomaticMasks(backend, SETTINGS))


@pytest.fixture(scope="module")
def scenes():
    """(image (3, H, W) uint8, true masks (N, H, W), selection of their eroded lower parts)."""
    result = []
    for index in SCENES:
        scene = render_scene(77, "val", index, SIZE[::-1])
        ids = torch.from_numpy(scene.instance_ids.astype(np.int64))
        objects = [ids == i for i in ids.unique() if i >= 1000 and (ids == i).sum() >= MIN_AREA]
        truth = torch.stack(objects)
        logits = torch.where(truth, 4.0, -4.0)
        logits = -F.max_pool2d(-logits[None], 5, stride=1, padding=2)[0]  # eroded by 2 px
        for mask in logits:
            top = mask.amax(1).argmax()
            mask[top : top + 4] = -4.0
        count = len(truth)
        labels = PseudoLabels(torch.arange(count), logits > 0, torch.ones(count))
        image = torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()
        result.append((image, truth, Selection(labels, logits, tuple(map(float, SIZE)), {})))
    return result


def ious(masks, truth):
    dims = (1, 2)
    return (masks & truth).sum(dims) / (masks | truth).sum(dims)


def refined_alone(refiner, image, selection):
    return refiner([selection], image[None], [SIZE])


@pytest.fixture(scope="module")
def alone(refiner, scenes):
    return [refined_alone(refiner, image, selection) for image, _, selection in scenes]


def test_parts_of_objects_become_the_objects(alone, scenes):
    for refined, (_, truth, selection) in zip(alone, scenes, strict=True):
        before, after = (ious(m, truth) for m in (selection.labels.masks, refined.labels[0].masks))
        assert refined.num_fallbacks <= len(truth) // 2
        assert after.mean() > before.mean() + 0.05
        assert (refined.predicted_ious > SETTINGS.pred_iou_thresh).all()


def test_padding_and_the_rest_of_the_batch_change_nothing(refiner, alone, scenes):
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *PADDED), generator=noise, dtype=torch.uint8)
    for padded, (image, _, _) in zip(images, scenes, strict=True):
        padded[:, : SIZE[0], : SIZE[1]] = image
    together = refiner([selection for *_, selection in scenes], images, [SIZE] * 2)
    for labels, expected in zip(together.labels, alone, strict=True):
        different = (labels.masks != expected.labels[0].masks).float().mean()
        assert labels.masks.shape[1:] == SIZE and different < 1e-3
    assert together.num_fallbacks == sum(one.num_fallbacks for one in alone)


def test_it_is_deterministic_and_the_same_for_floats(refiner, alone, scenes):
    image, _, selection = scenes[0]
    again = refined_alone(refiner, image.float(), selection)
    assert torch.equal(again.labels[0].masks, alone[0].labels[0].masks)
    assert torch.equal(again.predicted_ious, alone[0].predicted_ious)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same(alone, scenes):
    sam = load_sam(build_tiny_toyscapes, TOYSCAPES_WEIGHTS, "tiny_toyscapes").cuda()
    backend = SegmentAnythingBackend(sam)
    refiner = SEPLRefiner(backend=backend, automatic_masks=AutomaticMasks(backend, SETTINGS))
    image, _, selection = scenes[0]
    labels = selection.labels
    on_gpu = PseudoLabels(*(getattr(labels, n).cuda() for n in ("labels", "masks", "scores")))
    there = Selection(on_gpu, selection.mask_logits.cuda(), selection.content_size, {})
    refined = refined_alone(refiner, image.cuda(), there)
    masks = refined.labels[0].masks
    assert masks.is_cuda and refined.predicted_ious.is_cuda
    assert (masks.cpu() != alone[0].labels[0].masks).float().mean() < 1e-2
