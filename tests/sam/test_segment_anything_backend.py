"""The backend on segment-anything's classes, against the library's own code on single images.

What it shares with the other backends is in test_backends.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sam_cases import build_small, image_of
from segment_anything import SamPredictor

SIDE = 256


@pytest.fixture(scope="module")
def backend():
    return build_small("segment_anything")


def library_answer(backend, image, points, labels, multimask, mask_prompts):
    """SamPredictor on one image; points are normalized, of continuous coordinates."""
    predictor = SamPredictor(backend.sam)
    height, width = image.shape[1:]
    resized = predictor.transform.get_preprocess_shape(height, width, SIDE)
    frame = F.interpolate(image[None].float(), resized, mode="bilinear", antialias=True)
    predictor.set_torch_image(frame, (height, width))
    pixels = points * torch.tensor([resized[1], resized[0]]) - 0.5
    masks, quality, low = predictor.predict_torch(
        pixels,
        labels,
        mask_input=mask_prompts,
        multimask_output=multimask,
        return_logits=True,
    )
    return masks, quality, low, predictor.features


@pytest.mark.parametrize(("multimask", "masked"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("size", [(256, 256), (128, 256), (200, 90), (300, 500)])
def test_equals_the_librarys_predictor_on_one_image(backend, size, multimask, masked):
    image = image_of(*size)
    points = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]])
    shapes = 9 * torch.randn(5, 1, 128, 128, generator=torch.Generator().manual_seed(2))
    masks, quality, low, embedding = library_answer(
        backend, image, points, labels, multimask, shapes if masked else None
    )

    encoded = backend.encode(image[None], [size])
    options = {"mask_prompts": [shapes[:, 0]]} if masked else {}
    (answer,) = backend.prompt(encoded, [points], [labels], multimask=multimask, **options)

    torch.testing.assert_close(encoded.embeddings, embedding, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(answer.mask_logits, low, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(answer.iou_predictions, quality, atol=2e-4, rtol=1e-3)
    upscaled = backend.upscale(answer.mask_logits[:, 0], size)
    torch.testing.assert_close(upscaled, masks[:, 0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("clicks", [0, 2])
def test_boxes_alone_and_with_points_are_the_librarys(backend, clicks):
    image, draw = image_of(128, 256), torch.Generator().manual_seed(1)
    points = torch.rand(3, clicks, 2, generator=draw)
    labels = torch.tensor([[1, 1], [1, 0], [0, 1]])[:, :clicks]
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.6, 0.7]])
    predictor = SamPredictor(backend.sam)
    predictor.set_torch_image(image[None].float(), (128, 256))
    scale = torch.tensor([256.0, 128.0])
    clicked = (points * scale - 0.5, labels) if clicks else (None, None)
    corners = boxes * scale.repeat(2) - 0.5
    _, quality, low = predictor.predict_torch(*clicked, boxes=corners, return_logits=True)

    points = torch.cat([points, boxes.view(3, 2, 2)], dim=1)
    labels = torch.cat([labels, torch.tensor([2, 3]).expand(3, 2)], dim=1)
    encoded = backend.encode(image[None], [(128, 256)])
    (answer,) = backend.prompt(encoded, [points], [labels])
    torch.testing.assert_close(answer.mask_logits, low, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(answer.iou_predictions, quality, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("size", "scale", "rows", "columns"),
    [
        ((256, 256), (1.0, 1.0), 32, 32),
        ((128, 256), (1.0, 0.5), 16, 32),
        ((1024, 512), (0.5, 1.0), 32, 16),
        ((100, 256), (1.0, 100 / 256), 12, 32),  # 12.5 cells: the center of the 13th is outside
        ((101, 256), (1.0, 101 / 256), 13, 32),
        ((1, 1000), (1.0, 1 / 256), 0, 32),  # a pixel of the square, though a quarter of one
    ],
)
def test_grid_scale_and_content_mask_of_a_padded_image(backend, size, scale, rows, columns):
    assert backend.grid_scale(size) == pytest.approx(scale)
    mask = backend.content_mask(size)
    assert mask.shape == (32, 32) and mask.dtype == torch.bool
    assert mask[:rows, :columns].all() and mask.sum() == rows * columns
