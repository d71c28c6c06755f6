"""SAM and SAM 2 against their libraries' own predictors and decoders on single images.

What all backends do alike is in test_backends.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sam_cases import CLOSE, build_small, image_of, needs_sam2
from segment_anything import SamPredictor

BOTH = ["segment_anything", pytest.param("sam2", marks=needs_sam2)]
STRIDES = (4, 8, 16)  # of SAM 2's feature maps, in pixels of the frame
CLAMP = 32.0  # SAM 2's predictor clamps the low-resolution logits that it returns


def sam_predictor(backend, image):
    """The library's, and clicks in its pixels from normalized ones, of continuous coordinates."""
    predictor, (height, width) = SamPredictor(backend.sam), image.shape[1:]
    resized = predictor.transform.get_preprocess_shape(height, width, backend.image_side)
    frame = F.interpolate(image[None].float(), resized, mode="bilinear", antialias=True)
    predictor.set_torch_image(frame, (height, width))
    return predictor, lambda points: points * torch.tensor(resized[::-1]) - 0.5


def sam2_predictor(backend, image):
    """The same. It moves frame positions of clicks in image pixels by half a pixel."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor, side = SAM2ImagePredictor(backend.sam), backend.image_side
    predictor._bb_feat_sizes = [(side // stride,) * 2 for stride in STRIDES]  # not 1024's
    predictor.set_image(image.permute(1, 2, 0).numpy())
    extent = torch.tensor(image.shape[:0:-1])
    return predictor, lambda points: ((points - 0.5 / side) * extent).numpy()


def library_answer(backend, image, points, labels, shapes):
    """Masks, ratings, low-resolution logits, embeddings and finer maps of the predictor; and the
    image tokens after its two-way transformer."""
    tokens = []
    hook = backend.decoder.mask_decoder.transformer.register_forward_hook(
        lambda module, inputs, output: tokens.append(output[1].transpose(1, 2))
    )
    answers = predictor_answer(backend, image, points, labels, shapes)
    hook.remove()
    return *answers, tokens[0].unflatten(2, 2 * (backend.grid_side,))


def predictor_answer(backend, image, points, labels, shapes):
    options = {"mask_input": shapes, "return_logits": True}
    if backend.frame.padded:
        predictor, pixels = sam_predictor(backend, image)
        masks, ratings, low = predictor.predict_torch(pixels(points), labels, **options)
        return masks, ratings, low, predictor.features, []
    predictor, pixels = sam2_predictor(backend, image)
    options["mask_input"] = None if shapes is None else shapes.numpy()
    answers = predictor.predict(pixels(points), labels.numpy(), **options)
    masks, ratings, low = (torch.from_numpy(x) for x in answers)
    masks, low = (x.reshape(len(points), -1, *x.shape[-2:]) for x in (masks, low))
    found = predictor._features
    return masks, ratings.view(masks.shape[:2]), low, found["image_embed"], found["high_res_feats"]


@pytest.mark.parametrize("backend", BOTH, indirect=True)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "clicks"), [((128, 128), 1), ((64, 128), 3), ((200, 90), 3)])
def test_equals_the_librarys_predictor_on_one_image(backend, size, clicks, masked):
    image, draw = image_of(*size), torch.Generator().manual_seed(1)
    points = torch.rand(4, clicks, 2, generator=draw)
    box = [1, 1, 0] if backend.frame.padded else [1, 2, 3]  # SAM's predictor takes it apart
    labels = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], box])[:, :clicks]
    low_side = 4 * backend.grid_side
    shapes = 9 * torch.randn(4, 1, low_side, low_side, generator=draw) if masked else None
    expected = library_answer(backend, image, points, labels, shapes)
    masks, ratings, low, embeddings, finer_maps, features = expected

    encoded = backend.encode(image[None], [size])
    options = {"mask_prompts": [shapes[:, 0]]} if masked else {}
    (answer,) = backend.prompt(encoded, [points], [labels], **options)

    close = {"atol": 2e-4, "rtol": 1e-3} if backend.frame.padded else CLOSE
    clamp = float("inf") if backend.frame.padded else CLAMP
    assert answer.mask_logits.shape == (4, 3, low_side, low_side)
    torch.testing.assert_close(encoded.embeddings, embeddings, **close)
    torch.testing.assert_close(list(encoded.finer_maps), finer_maps, **close)
    torch.testing.assert_close(answer.mask_logits.clamp(-clamp, clamp), low, **close)
    torch.testing.assert_close(answer.iou_predictions, ratings, **close)
    if clicks == 1 and not masked:
        [found] = backend.prompted_features(encoded, [points[:, 0]])
        is_positive = labels[:, 0] == 1
        torch.testing.assert_close(found[is_positive], features[is_positive], **close)
    for i in range(masks.shape[1]):
        upscaled = backend.upscale(answer.mask_logits[:, i], size)
        torch.testing.assert_close(upscaled, masks[:, i], **close)


@pytest.mark.parametrize("clicks", [0, 2])
def test_boxes_alone_and_with_points_are_sams(clicks):
    backend, image = build_small("segment_anything"), image_of(64, 128)
    points = torch.rand(3, clicks, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 1], [1, 0], [0, 1]])[:, :clicks]
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.6, 0.7]])
    corners = boxes.view(3, 2, 2)
    predictor, pixels = sam_predictor(backend, image)
    clicked = (pixels(points), labels) if clicks else (None, None)
    asked = {"boxes": pixels(corners).view(3, 4), "return_logits": True}
    _, ratings, low = predictor.predict_torch(*clicked, **asked)

    points = torch.cat([points, corners], dim=1)
    labels = torch.cat([labels, torch.tensor([2, 3]).expand(3, 2)], dim=1)
    (answer,) = backend.prompt(backend.encode(image[None], [(64, 128)]), [points], [labels])
    torch.testing.assert_close(answer.mask_logits, low, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(answer.iou_predictions, ratings, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", BOTH, indirect=True)
@pytest.mark.parametrize(
    ("size", "scale", "rows", "columns"),  # in a padded frame of 64 px and 8 x 8 cells
    [
        ((256, 256), (1.0, 1.0), 8, 8),
        ((128, 256), (1.0, 0.5), 4, 8),
        ((1024, 512), (0.5, 1.0), 8, 4),
        ((36, 64), (1.0, 36 / 64), 4, 8),  # 4.5 cells: the center of the 5th is not inside
        ((37, 64), (1.0, 37 / 64), 5, 8),
        ((1, 1000), (1.0, 1 / 64), 0, 8),  # a pixel of the square, though less than one
    ],
)
def test_grid_scale_and_content_mask(backend, size, scale, rows, columns):
    """SAM 2's images are stretched over the whole grid."""
    if not backend.frame.padded:
        scale, rows, columns = (1.0, 1.0), backend.grid_side, backend.grid_side
    assert backend.grid_scale(size) == pytest.approx(scale)
    mask = backend.content_mask(size)
    assert mask.shape == (8, 8) and mask.dtype == torch.bool
    assert mask[:rows, :columns].all() and mask.sum() == rows * columns
