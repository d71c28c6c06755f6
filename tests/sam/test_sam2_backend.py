"""The SAM 2 backend against the sam2 package's own image predictor.

What it shares with the other backends is in test_backends.py.
"""

from __future__ import annotations

import pytest
import torch
from sam_cases import SAM2_SIDE, build_small, image_of, needs_sam2

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


def library_answer(backend, image, points, labels, multimask, mask_prompts):
    """SAM2ImagePredictor on one image; points are normalized, of continuous coordinates."""
    predictor = predictor_of(backend)
    predictor.set_image(image.permute(1, 2, 0).numpy())
    pixels = as_pixels(points, image.shape[1:])
    masks, quality, low = (
        torch.from_numpy(value).reshape(len(points), -1, *value.shape[value.ndim - tail :])
        for value, tail in zip(
            predictor.predict(
                pixels.numpy(),
                labels.numpy(),
                mask_input=mask_prompts,
                multimask_output=multimask,
                return_logits=True,
            ),
            (2, 0, 2),
            strict=True,
        )
    )
    return masks, quality, low, predictor._features


@pytest.mark.parametrize(("multimask", "masked"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(
    ("size", "clicks"),
    [((SAM2_SIDE, SAM2_SIDE), 1), ((64, 128), 3), ((200, 90), 1), ((300, 500), 3)],
)
def test_equals_the_librarys_predictor_on_one_image(backend, size, clicks, multimask, masked):
    image = image_of(*size)
    points = torch.rand(4, clicks, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 2, 3]])[:, :clicks]
    low_side = SAM2_SIDE // 4
    shapes = 9 * torch.randn(4, 1, low_side, low_side, generator=torch.Generator().manual_seed(2))
    masks, quality, low, maps = library_answer(
        backend, image, points, labels, multimask, shapes.numpy() if masked else None
    )

    encoded = backend.encode(image[None], [size])
    options = {"mask_prompts": [shapes[:, 0]]} if masked else {}
    (answer,) = backend.prompt(encoded, [points], [labels], multimask=multimask, **options)

    assert answer.mask_logits.shape == (4, 3 if multimask else 1, SAM2_SIDE // 4, SAM2_SIDE // 4)
    torch.testing.assert_close(encoded.embeddings, maps["image_embed"], **CLOSE)
    torch.testing.assert_close(list(encoded.finer_maps), maps["high_res_feats"], **CLOSE)
    torch.testing.assert_close(answer.mask_logits.clamp(-CLAMP, CLAMP), low, **CLOSE)
    torch.testing.assert_close(answer.iou_predictions, quality, **CLOSE)
    for i in range(masks.shape[1]):
        upscaled = backend.upscale(answer.mask_logits[:, i], size)
        torch.testing.assert_close(upscaled, masks[:, i], **CLOSE)


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
