"""SAM's automatic masks from our backends, against the library's own generator on its own SAM; the
ranges of their settings, and what a fingerprint tells apart."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_utils
from sam_cases import build_small, image_of
from segment_anything import SamAutomaticMaskGenerator
from torch import nn
from toyscapes_scene import render_scene

from s4m_d2.errors import InputError
from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sam.backend import EncodedImages, PromptOutput, SamBackend
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.point_prompts import Frame
from s4m_d2.sam.segment_anything import (
    TOYSCAPES_WEIGHTS,
    SegmentAnythingBackend,
    build_tiny_toyscapes,
)

SEED = 77  # neither a data set's nor the training's
# The defaults are ViT-H's, and few of the tiny SAM's masks pass them.
TINY = AutomaticMaskSettings(points_per_side=5, pred_iou_thresh=0.6, stability_score_thresh=0.6)
ALL_MASKS = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
NAMES = {
    "segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    sam = load_sam(build_tiny_toyscapes, TOYSCAPES_WEIGHTS, "tiny_toyscapes")
    return SegmentAnythingBackend(sam)


def scene_image(index=0, size=(256, 128)):
    return render_scene(SEED, "test", index, size).image


def library_masks(backend, settings, image):
    generator = SamAutomaticMaskGenerator(backend.sam, **asdict(settings), output_mode="coco_rle")
    return generator.generate(image)


def decoded(records):
    return np.array([mask_utils.decode(r["segmentation"]).astype(bool) for r in records])


def overlaps(records, others):
    """IoUs of all pairs of masks."""
    first, second = ([record["segmentation"] for record in of] for of in (records, others))
    return mask_utils.iou(first, second, [0] * len(second))


@pytest.mark.parametrize(
    ("size", "changes"),  # (width, height): nothing is resized
    [
        ((256, 128), {}),
        ((256, 128), {"stability_score_offset": 2.5, "min_mask_region_area": 60}),
        ((200, 256), {"points_per_batch": 7, "box_nms_thresh": 0.3, "pred_iou_thresh": 0.0,
                      "stability_score_thresh": 0.9}),
    ],
)  # fmt: skip
def test_equals_the_librarys_generator_where_it_resizes_nothing(tiny, size, changes):
    settings, image = replace(TINY, **changes), scene_image(size=size)
    expected = library_masks(tiny, settings, image)
    found = AutomaticMasks(tiny, settings).generate(image)
    assert len(found) == len(expected) >= 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() == NAMES
        for name in ("predicted_iou", "stability_score"):
            assert ours[name] == pytest.approx(theirs[name], abs=5e-3)
        for name in ("point_coords", "crop_box"):
            assert ours[name] == theirs[name]
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1)
        mask, other = decoded([ours, theirs])
        assert (mask != other).sum() <= 0.005 * other.sum()
        assert ours["area"] == mask.sum()


def test_is_close_to_the_librarys_generator_where_images_and_crops_are_resized(tiny):
    """It resizes 8-bit values by Pillow, the backends floats."""
    size, image = (180, 140), scene_image(1, (180, 140))
    settings = replace(TINY, crop_n_layers=1, crop_n_points_downscale_factor=2)
    expected = library_masks(tiny, settings, image)
    found = AutomaticMasks(tiny, settings).generate(image)
    matches = overlaps(found, expected)
    assert len(expected) >= 6
    assert (matches.max(0) > 0.95).mean() > 0.85 and (matches.max(1) > 0.95).mean() > 0.85
    crops = {tuple(record["crop_box"]) for record in found}
    assert (0, 0, *size) in crops and len(crops) > 1
    assert all(record["segmentation"]["size"] == [size[1], size[0]] for record in found)


class HalvesBackend(SamBackend):
    """A third party's: a click is answered by the half of the image in which it lies, thrice."""

    image_side, grid_side, device = 64, 8, torch.device("cpu")
    prompted_features = None  # distillation alone asks for them

    def __init__(self):
        self.clicks, self.encodings = [], []

    def encode(self, images, image_sizes):
        assert images.dtype == torch.uint8
        self.encodings.append(images.clone())
        return EncodedImages(torch.zeros(len(images), 1, 8, 8), list(image_sizes))

    def prompt(self, encoded, points, labels=None):
        assert labels is None
        assert all(((p >= 0) & (p <= 1)).all() for p in points)
        self.clicks += points
        halves = torch.arange(16) >= 8
        is_right = torch.cat(points)[:, :, :1] >= 0.5
        logits = torch.where(halves == is_right, 10.0, -10.0)[:, :, None].expand(-1, 3, 16, 16)
        ratings = torch.tensor([0.95, 0.9, 0.89]).expand(len(logits), 3)
        return [PromptOutput(logits, ratings)]

    def grid_scale(self, image_size):
        return 1.0, 1.0

    def upscale(self, mask_logits, image_size):
        return F.interpolate(mask_logits[:, None], image_size, mode="nearest")[:, 0]


def test_a_backend_of_a_third_party_gives_its_masks():
    """An encoded image is not encoded again."""
    backend, pixels = HalvesBackend(), image_of(32, 48)
    image = pixels.permute(1, 2, 0).numpy()
    generator = AutomaticMasks(backend, AutomaticMaskSettings(points_per_side=4))
    encoded = backend.encode(pixels[None], [(32, 48)])
    known = generator.generate(image, encoded)
    assert len(backend.encodings) == 1 and generator.generate(image) == known
    left, right = sorted(known, key=lambda record: record["bbox"])
    for record, columns in ((left, slice(0, 24)), (right, slice(24, 48))):
        expected = np.zeros((32, 48), dtype=bool)
        expected[:, columns] = True
        np.testing.assert_array_equal(decoded([record])[0], expected)
        assert record["area"] == 32 * 24 and record["bbox"] == [columns.start, 0, 23, 31]
        assert record["predicted_iou"] == pytest.approx(0.95)
        assert record["stability_score"] == 1.0 and record["crop_box"] == [0, 0, 48, 32]
        ((x, y),) = record["point_coords"]
        assert x in (6, 18, 30, 42) and (x >= 24) == (record is right) and y in (4, 12, 20, 28)
    assert all(torch.equal(encoding[0], pixels) for encoding in backend.encodings)
    # Centers of a grid of 4 x 4, and half a pixel of a square of 64.
    lines = torch.tensor([8.5, 24.5, 40.5, 56.5]) / 64
    expected = torch.stack(torch.meshgrid(lines, lines, indexing="xy"), dim=-1).reshape(16, 1, 2)
    torch.testing.assert_close(torch.cat(backend.clicks), torch.cat([expected, expected]))


BLACK = np.zeros((32, 48, 3), np.uint8)


@pytest.mark.parametrize("layers", [0, 2])
def test_where_no_mask_passes_and_where_all_are_empty_there_is_none(layers):
    """The library's records of masks without a pixel have a stability of 0 / 0."""

    class EmptyBackend(HalvesBackend):
        def prompt(self, *args, **kwargs):
            (answer,) = super().prompt(*args, **kwargs)
            return [replace(answer, mask_logits=torch.full_like(answer.mask_logits, -9.0))]

    strict = AutomaticMaskSettings(2, pred_iou_thresh=1.0, crop_n_layers=layers)
    assert AutomaticMasks(HalvesBackend(), strict).generate(BLACK) == []
    loose = AutomaticMaskSettings(2, crop_n_layers=layers, **ALL_MASKS)
    assert AutomaticMasks(EmptyBackend(), loose).generate(BLACK) == []


@pytest.mark.parametrize("size", [(5, 7), (40, 1), (1, 1), (1, 200)])
def test_masks_of_tiny_images(size):
    """A side of 1 px has no halves to crop, and less than a pixel in the frame for 1 of 200."""
    image, backend = image_of(*size).permute(1, 2, 0).numpy(), HalvesBackend()
    frame = Frame(64, None, None, padded=True)
    backend.grid_scale = lambda size: [side / 64 for side in frame.resized(size)[::-1]]
    settings = AutomaticMaskSettings(points_per_side=2, crop_n_layers=2, **ALL_MASKS)
    records = AutomaticMasks(backend, settings).generate(image)
    for record, mask in zip(records, decoded(records), strict=True):
        assert mask.shape == size and record["area"] == mask.sum() > 0
    assert records


def test_the_fingerprint_names_weights_and_settings():
    backend = build_small("segment_anything")

    def fingerprint(backend=backend, **changes):
        return AutomaticMasks(backend, AutomaticMaskSettings(**changes)).fingerprint()

    known = fingerprint()
    assert fingerprint(SegmentAnythingBackend(deepcopy(backend.sam))) == known
    assert fingerprint(points_per_batch=3) == known
    assert fingerprint(box_nms_thresh=1) == fingerprint(box_nms_thresh=1.0)
    defaults = asdict(AutomaticMaskSettings())
    changes = {name: 2 if isinstance(x, int) else 0.5 for name, x in defaults.items()}
    del changes["points_per_batch"]
    other = SegmentAnythingBackend(deepcopy(backend.sam))
    other.sam.mask_decoder.iou_token.weight.add_(1)
    prints = [known, fingerprint(other), *(fingerprint(**dict([pair])) for pair in changes.items())]
    assert len(set(prints)) == len(prints)


def test_a_backend_of_the_bare_interface_has_a_fingerprint():
    class Own(HalvesBackend):
        def __init__(self, value):
            super().__init__()
            self.part = nn.Linear(1, 1)
            nn.init.constant_(self.part.weight, value)
            nn.init.zeros_(self.part.bias)

    assert len({AutomaticMasks(Own(value)).fingerprint() for value in (1.0, 1.0, 2.0)}) == 2


def test_settings_out_of_range_are_refused_by_name():
    for changes in (
        {"points_per_side": 0},
        {"points_per_batch": 0},
        {"pred_iou_thresh": 1.01},
        {"stability_score_thresh": -0.1},
        {"stability_score_offset": float("inf")},
        {"box_nms_thresh": float("nan")},
        {"crop_n_layers": -1},
        {"min_mask_region_area": -1},
        {"points_per_side": 7, "crop_n_layers": 3, "crop_n_points_downscale_factor": 2},
    ):
        with pytest.raises(InputError, match=next(iter(changes))):
            AutomaticMaskSettings(**changes)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_on_cuda_the_masks_are_those_of_the_cpu(tiny, layers):
    sam = load_sam(build_tiny_toyscapes, TOYSCAPES_WEIGHTS, "tiny_toyscapes").cuda()
    there = SegmentAnythingBackend(sam, precision="float32")
    settings = replace(TINY, crop_n_layers=layers)
    expected, found = (
        AutomaticMasks(backend, settings).generate(scene_image(1)) for backend in (tiny, there)
    )
    matches = overlaps(found, expected)
    assert len(expected) > 5
    assert (matches.max(0) > 0.95).mean() > 0.85 and (matches.max(1) > 0.95).mean() > 0.85
