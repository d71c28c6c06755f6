"""The backend on segment-anything's classes, against the library's own code on single images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from torch import nn

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.sam.tiny import build_tiny_sam

SIDE = 256
LOGITS = {"atol": 2e-5, "rtol": 1e-4}


def random_sam() -> nn.Module:
    """A tiny SAM whose every parameter is random, also those the library starts at zero."""
    generator = torch.Generator().manual_seed(3)
    sam = build_tiny_sam()
    with torch.no_grad():
        for value in sam.state_dict().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return sam


@pytest.fixture(scope="module")
def backend() -> SegmentAnythingBackend:
    return SegmentAnythingBackend(random_sam())


def image_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def batch_of(*images: torch.Tensor, fill: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Images at the top left of one (B, 3, H, W) batch, and their sizes."""
    sizes = [tuple(image.shape[1:]) for image in images]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    batch = torch.full((len(images), 3, height, width), fill, dtype=torch.uint8)
    for i, (h, w) in enumerate(sizes):
        batch[i, :, :h, :w] = images[i]
    return batch, sizes


def library_answer(backend, image, points, labels, multimask):
    """SamPredictor on one image; points are normalized, of continuous coordinates."""
    predictor = SamPredictor(backend.sam)
    height, width = image.shape[1:]
    resized = predictor.transform.get_preprocess_shape(height, width, SIDE)
    frame = F.interpolate(image[None].float(), resized, mode="bilinear", antialias=True)
    predictor.set_torch_image(frame, (height, width))
    pixels = points * torch.tensor([resized[1], resized[0]]) - 0.5
    masks, quality, low = predictor.predict_torch(
        pixels, labels, multimask_output=multimask, return_logits=True
    )
    return masks, quality, low, predictor.features


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("size", [(256, 256), (128, 256), (200, 90), (300, 500)])
def test_equals_the_librarys_predictor_on_one_image(backend, size, multimask):
    image = image_of(*size)
    points = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]])
    masks, quality, low, embedding = library_answer(backend, image, points, labels, multimask)

    encoded = backend.encode(image[None], [size])
    (answer,) = backend.prompt(encoded, [points], [labels], multimask=multimask)

    torch.testing.assert_close(encoded.embeddings, embedding, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(answer.mask_logits, low, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(answer.iou_predictions, quality, atol=2e-4, rtol=1e-3)
    upscaled = backend.upscale(answer.mask_logits[:, 0], size)
    torch.testing.assert_close(upscaled, masks[:, 0], atol=2e-4, rtol=1e-3)


def test_features_are_the_image_tokens_after_the_librarys_two_way_transformer(backend):
    seen = []
    hook = backend.sam.mask_decoder.transformer.register_forward_hook(
        lambda module, inputs, output: seen.append(output[1])
    )
    image, points = image_of(128, 256), torch.rand(2, 1, 2)
    library_answer(backend, image, points, torch.ones(2, 1), True)
    hook.remove()
    encoded = backend.encode(image[None], [(128, 256)])
    (answer,) = backend.prompt(encoded, [points], masks=False, features=True)
    expected = seen[0].transpose(1, 2).reshape(2, -1, backend.grid_side, backend.grid_side)
    torch.testing.assert_close(answer.features, expected, **LOGITS)
    assert answer.mask_logits is None and answer.iou_predictions is None


def test_a_batch_of_unequal_images_and_prompt_counts_equals_single_images(backend):
    images = [image_of(128, 256, 1), image_of(256, 160, 2), image_of(100, 100, 3)]
    batch, sizes = batch_of(*images)
    points = [torch.rand(3, 3, 2), torch.zeros(0, 3, 2), torch.rand(2, 1, 2)]
    together = backend.prompt(backend.encode(batch, sizes), points, features=True)
    for image, size, p, answer in zip(images, sizes, points, together, strict=True):
        (alone,) = backend.prompt(backend.encode(image[None], [size]), [p], features=True)
        assert len(answer.mask_logits) == len(p)
        torch.testing.assert_close(answer.mask_logits, alone.mask_logits, **LOGITS)
        torch.testing.assert_close(answer.iou_predictions, alone.iou_predictions, **LOGITS)
        torch.testing.assert_close(answer.features, alone.features, **LOGITS)


def test_what_lies_in_the_padding_of_a_batch_changes_nothing(backend):
    images = [image_of(128, 256), image_of(256, 120)]
    black, sizes = batch_of(*images)
    white, _ = batch_of(*images, fill=255)
    torch.testing.assert_close(
        backend.encode(black, sizes).embeddings, backend.encode(white, sizes).embeddings
    )


def test_padding_points_are_neutral_wherever_they_stand(backend):
    encoded = backend.encode(image_of(128, 256)[None], [(128, 256)])
    points = torch.rand(2, 2, 2)
    labels = torch.tensor([[1, 0], [1, 1]])
    (plain,) = backend.prompt(encoded, [points], [labels], features=True)
    padded_points = torch.rand(2, 4, 2)
    padded_labels = torch.full((2, 4), -1)
    for row, columns in enumerate([(0, 3), (1, 2)]):
        padded_points[row, list(columns)] = points[row]
        padded_labels[row, list(columns)] = labels[row]
    (padded,) = backend.prompt(encoded, [padded_points], [padded_labels], features=True)
    torch.testing.assert_close(padded.mask_logits, plain.mask_logits, **LOGITS)
    torch.testing.assert_close(padded.features, plain.features, **LOGITS)


def test_prompts_with_different_numbers_of_points_keep_their_rows(backend):
    encoded = backend.encode(image_of(128, 256)[None], [(128, 256)])
    points, labels = torch.rand(5, 3, 2), torch.ones(5, 3, dtype=torch.long)
    for row, count in enumerate([3, 1, 2, 1, 3]):
        labels[row, count:] = -1
    (mixed,) = backend.prompt(encoded, [points], [labels])
    for row in range(5):
        (one,) = backend.prompt(encoded, [points[row : row + 1]], [labels[row : row + 1]])
        torch.testing.assert_close(mixed.mask_logits[row], one.mask_logits[0], **LOGITS)


def test_chunks_do_not_change_the_answer(backend):
    encoded = backend.encode(*batch_of(image_of(128, 256), image_of(256, 256)))
    points = [torch.rand(4, 1, 2), torch.rand(3, 2, 2)]
    small = SegmentAnythingBackend(backend.sam, max_prompts_per_chunk=2)
    for whole, parts in zip(
        backend.prompt(encoded, points), small.prompt(encoded, points), strict=True
    ):
        torch.testing.assert_close(whole.mask_logits, parts.mask_logits, **LOGITS)
        torch.testing.assert_close(whole.iou_predictions, parts.iou_predictions, **LOGITS)


def test_no_prompts_at_all_and_no_images_at_all(backend):
    encoded = backend.encode(image_of(128, 256)[None], [(128, 256)])
    (answer,) = backend.prompt(encoded, [torch.zeros(0, 1, 2)], features=True)
    assert answer.mask_logits.shape == (0, 3, 128, 128)
    assert answer.iou_predictions.shape == (0, 3)
    assert answer.features.shape == (0, 64, 32, 32)
    none = backend.encode(torch.zeros(0, 3, 64, 64), [])
    assert backend.prompt(none, []) == []
    assert backend.upscale(answer.mask_logits[:, 0], (128, 256)).shape == (0, 128, 256)


def test_select_gives_the_images_in_the_order_asked_for(backend):
    encoded = backend.encode(*batch_of(image_of(128, 256), image_of(256, 100)))
    swapped = encoded.select([1, 0])
    assert swapped.image_sizes == [(256, 100), (128, 256)]
    torch.testing.assert_close(swapped.embeddings, encoded.embeddings.flip(0))


@pytest.mark.parametrize(
    ("size", "scale", "rows", "columns"),
    [
        ((256, 256), (1.0, 1.0), 32, 32),
        ((128, 256), (1.0, 0.5), 16, 32),
        ((1024, 512), (0.5, 1.0), 32, 16),
        ((100, 256), (1.0, 100 / 256), 12, 32),  # 12.5 cells: the center of the 13th is outside
        ((101, 256), (1.0, 101 / 256), 13, 32),
    ],
)
def test_grid_scale_and_content_mask_of_a_padded_image(backend, size, scale, rows, columns):
    assert backend.grid_scale(size) == pytest.approx(scale)
    mask = backend.content_mask(size)
    assert mask.shape == (32, 32) and mask.dtype == torch.bool
    assert mask[:rows, :columns].all() and mask.sum() == rows * columns


@pytest.mark.parametrize("size", [(128, 256), (512, 1024), (200, 90)])
def test_upscale_returns_a_mask_to_its_place_in_the_image(backend, size):
    """A half plane x < c of the content, drawn in the square frame, comes back as x < c."""
    edge_x, edge_y = 0.375, 0.625
    scale_x, scale_y = backend.grid_scale(size)
    centers = (torch.arange(128) + 0.5) / 128
    logits = torch.stack([
        (edge_x * scale_x - centers)[None, :].expand(128, 128),
        (edge_y * scale_y - centers)[:, None].expand(128, 128),
    ])  # fmt: skip
    left, top = backend.upscale(logits, size) > 0
    x = (torch.arange(size[1]) + 0.5) / size[1]
    y = (torch.arange(size[0]) + 0.5) / size[0]
    cell_x, cell_y = 1 / (128 * scale_x), 1 / (128 * scale_y)
    sure_x, sure_y = (x - edge_x).abs() > cell_x, (y - edge_y).abs() > cell_y
    assert (left[:, sure_x] == (x < edge_x)[sure_x]).all()
    assert (top[sure_y] == (y < edge_y)[sure_y, None]).all()


def test_the_model_is_frozen_and_stays_out_of_its_holder(backend):
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sam = backend

    assert list(Holder().state_dict()) == []
    assert not backend.sam.training
    assert not any(p.requires_grad for p in backend.sam.parameters())
    encoded = backend.encode(image_of(128, 256)[None].float().requires_grad_(), [(128, 256)])
    (answer,) = backend.prompt(encoded, [torch.rand(1, 1, 2)], features=True)
    assert not encoded.embeddings.requires_grad and not answer.features.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (answer.features.mean() * weight).sum().backward()  # no inference-mode tensor
    assert weight.grad is not None


def test_autocast_keeps_the_outputs_in_float32_and_close(backend):
    batch, sizes = batch_of(image_of(128, 256))
    points = [torch.rand(2, 3, 2)]
    (exact,) = backend.prompt(backend.encode(batch, sizes), points)
    with torch.autocast("cpu", torch.bfloat16):
        (coarse,) = backend.prompt(backend.encode(batch, sizes), points, features=True)
    assert coarse.mask_logits.dtype == coarse.features.dtype == torch.float32
    scale = exact.mask_logits.std()
    assert (coarse.mask_logits - exact.mask_logits).abs().mean() < 0.1 * scale


@pytest.mark.parametrize(
    ("images", "sizes", "message"),
    [
        (torch.zeros(1, 3, 64, 64), [(64, 65)], "does not fit"),
        (torch.zeros(1, 3, 64, 64), [(0, 64)], "does not fit"),
        (torch.zeros(2, 3, 64, 64), [(64, 64)], "1 image_sizes"),
        (torch.zeros(1, 1, 64, 64), [(64, 64)], "expected"),
    ],
)
def test_images_that_disagree_with_their_sizes_are_refused(backend, images, sizes, message):
    with pytest.raises(InputError, match=message):
        backend.encode(images, sizes)


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        ([], None, "1 encoded images, but points for 0"),
        ([torch.rand(2, 2)], None, r"expected \(N, P, 2\)"),
        ([torch.rand(2, 1, 2)], [torch.ones(2, 2)], r"labels \(2, 2\)"),
        ([torch.rand(1, 2, 2)], [torch.tensor([[1, 2]])], "1, 0 or -1"),
    ],
)
def test_prompts_of_the_wrong_shape_are_refused(backend, points, labels, message):
    encoded = backend.encode(image_of(64, 64)[None], [(64, 64)])
    with pytest.raises(InputError, match=message):
        backend.prompt(encoded, points, labels)


def test_a_chunk_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="MAX_PROMPTS is 0"):
        SegmentAnythingBackend(build_tiny_sam(), max_prompts_per_chunk=0)
