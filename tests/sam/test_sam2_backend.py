"""The SAM 2 backend against the sam2 package's own image predictor.

What it shares with the other backends is in test_backends.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sam_cases import LOGITS, SAM2_SIDE, batch_of, build_small, image_of, needs_sam2

pytestmark = needs_sam2

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
CLAMP = 32.0  # the predictor clamps the low-resolution logits that it returns
STRIDES = (4, 8, 16)  # of the feature maps, in pixels of the frame


@pytest.fixture(scope="module")
def backend():
    return build_small("sam2")


def predictor_of(backend):
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(backend.sam)
    predictor._bb_feat_sizes = [(SAM2_SIDE // stride,) * 2 for stride in STRIDES]  # it says 1024's
    return predictor


def as_pixels(points, size):
    """The predictor's clicks in image pixels, whose frame positions it moves by half a pixel."""
    height, width = size
    return (points - 0.5 / SAM2_SIDE) * torch.tensor([width, height])


def library_answer(backend, image, points, labels, multimask):
    """SAM2ImagePredictor on one image; points are normalized, of continuous coordinates."""
    predictor = predictor_of(backend)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    pixels = as_pixels(points, image.shape[1:])
    masks, quality, low = (
        torch.from_numpy(value).reshape(len(points), -1, *value.shape[value.ndim - tail :])
        for value, tail in zip(
            predictor.predict(
                pixels.numpy(), labels.numpy(), multimask_output=multimask, return_logits=True
            ),
            (2, 0, 2),
            strict=True,
        )
    )
    return masks, quality, low, predictor._features


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("clicks", [1, 3])
@pytest.mark.parametrize("size", [(SAM2_SIDE, SAM2_SIDE), (64, 128), (200, 90), (300, 500)])
def test_equals_the_librarys_predictor_on_one_image(backend, size, clicks, multimask):
    image = image_of(*size)
    points = torch.rand(4, clicks, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]])[:, :clicks]
    masks, quality, low, maps = library_answer(backend, image, points, labels, multimask)

    encoded = backend.encode(image[None], [size])
    (answer,) = backend.prompt(encoded, [points], [labels], multimask=multimask)

    assert answer.mask_logits.shape == (4, 3 if multimask else 1, SAM2_SIDE // 4, SAM2_SIDE // 4)
    torch.testing.assert_close(encoded.embeddings, maps["image_embed"], **CLOSE)
    torch.testing.assert_close(list(encoded.finer_maps), maps["high_res_feats"], **CLOSE)
    torch.testing.assert_close(answer.mask_logits.clamp(-CLAMP, CLAMP), low, **CLOSE)
    torch.testing.assert_close(answer.iou_predictions, quality, **CLOSE)
    for i in range(masks.shape[1]):
        upscaled = backend.upscale(answer.mask_logits[:, i], size)
        torch.testing.assert_close(upscaled, masks[:, i], **CLOSE)


def test_a_batch_of_unequal_images_equals_the_librarys_batch(backend):
    images = [image_of(64, 128, 1), image_of(130, 70, 2), image_of(100, 100, 3)]
    points = [torch.rand(3, 1, 2), torch.rand(2, 3, 2), torch.rand(4, 2, 2)]
    batch, sizes = batch_of(*images)
    predictor = predictor_of(backend)
    predictor.set_image_batch([image.permute(1, 2, 0).numpy() for image in images])
    masks, quality, _ = predictor.predict_batch(
        [as_pixels(p, size).numpy() for p, size in zip(points, sizes, strict=True)],
        [torch.ones(p.shape[:2]).numpy() for p in points],
        return_logits=True,
    )
    answers = backend.prompt(backend.encode(batch, sizes), points)
    for answer, size, expected, rated in zip(answers, sizes, masks, quality, strict=True):
        torch.testing.assert_close(answer.iou_predictions, torch.from_numpy(rated), **CLOSE)
        upscaled = backend.upscale(answer.mask_logits.flatten(0, 1), size).unflatten(0, (-1, 3))
        torch.testing.assert_close(upscaled, torch.from_numpy(expected), **CLOSE)


def test_the_finer_maps_reach_the_masks_and_nothing_else(backend):
    encoded = backend.encode(image_of(64, 128)[None], [(64, 128)])
    points = [torch.rand(2, 1, 2)]
    (same,) = backend.prompt(encoded, points, features=True)
    for level in range(2):
        maps = list(encoded.finer_maps)
        maps[level] = torch.zeros_like(maps[level])
        (other,) = backend.prompt(replace(encoded, finer_maps=tuple(maps)), points, features=True)
        assert not torch.allclose(other.mask_logits, same.mask_logits, **LOGITS)
        torch.testing.assert_close(other.features, same.features, rtol=0, atol=0)
        torch.testing.assert_close(other.iou_predictions, same.iou_predictions, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(128, 128), (64, 128), (301, 77)])
def test_a_stretched_image_fills_the_whole_grid(backend, size):
    assert backend.grid_scale(size) == (1.0, 1.0)
    mask = backend.content_mask(size)
    assert mask.shape == (SAM2_SIDE // 16, SAM2_SIDE // 16) and mask.dtype == torch.bool
    assert mask.all()


def test_a_model_without_finer_maps_or_memory_embedding_is_used_as_the_library_uses_it():
    from sam2.modeling.sam2_base import SAM2Base
    from torch import nn

    from s4m_d2.sam.sam2 import Sam2Backend

    whole = build_small("sam2").sam
    plain = SAM2Base(whole.image_encoder, nn.Identity(), nn.Identity(), image_size=SAM2_SIDE)
    backend = Sam2Backend(plain)
    encoded = backend.encode(image_of(64, 128)[None], [(64, 128)])
    assert encoded.finer_maps == ()
    points = torch.rand(2, 3, 2)
    predictor = predictor_of(backend)
    predictor._bb_feat_sizes = predictor._bb_feat_sizes[-1:]
    predictor.set_image(image_of(64, 128).permute(1, 2, 0).numpy())
    _, quality, low = predictor.predict(
        as_pixels(points, (64, 128)).numpy(), torch.ones(2, 3).numpy(), return_logits=True
    )
    (answer,) = backend.prompt(encoded, [points])
    torch.testing.assert_close(answer.iou_predictions, torch.from_numpy(quality), **CLOSE)
    torch.testing.assert_close(
        answer.mask_logits.clamp(-CLAMP, CLAMP), torch.from_numpy(low), **CLOSE
    )
