"""What every backend does alike: batches, padding, chunks, freezing, refusals."""

from __future__ import annotations

import pytest
import torch
from sam_cases import LOGITS, batch_of, build_small, image_of, needs_sam2
from torch import nn

from s4m_d2.errors import ConfigError, InputError


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
    first, second = backend.encode(black, sizes), backend.encode(white, sizes)
    torch.testing.assert_close(first.embeddings, second.embeddings)
    torch.testing.assert_close(first.finer_maps, second.finer_maps)


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
    small = type(backend)(backend.sam, max_prompts_per_chunk=2)
    for whole, parts in zip(
        backend.prompt(encoded, points), small.prompt(encoded, points), strict=True
    ):
        torch.testing.assert_close(whole.mask_logits, parts.mask_logits, **LOGITS)
        torch.testing.assert_close(whole.iou_predictions, parts.iou_predictions, **LOGITS)


def test_no_prompts_at_all_and_no_images_at_all(backend):
    encoded = backend.encode(image_of(128, 256)[None], [(128, 256)])
    (answer,) = backend.prompt(encoded, [torch.zeros(0, 1, 2)], features=True)
    channels, grid = encoded.embeddings.shape[1], backend.grid_side
    assert answer.mask_logits.shape == (0, 3, 4 * grid, 4 * grid)
    assert answer.iou_predictions.shape == (0, 3)
    assert answer.features.shape == (0, channels, grid, grid)
    none = backend.encode(torch.zeros(0, 3, 64, 64), [])
    assert backend.prompt(none, []) == []
    assert backend.upscale(answer.mask_logits[:, 0], (128, 256)).shape == (0, 128, 256)


def test_select_gives_the_images_in_the_order_asked_for(backend):
    encoded = backend.encode(*batch_of(image_of(128, 256), image_of(256, 100)))
    swapped = encoded.select([1, 0])
    assert swapped.image_sizes == [(256, 100), (128, 256)]
    torch.testing.assert_close(swapped.embeddings, encoded.embeddings.flip(0))
    points = [torch.rand(2, 1, 2), torch.rand(1, 1, 2)]
    answers = backend.prompt(encoded, points)
    for answer, other in zip(answers, backend.prompt(swapped, points[::-1])[::-1], strict=True):
        torch.testing.assert_close(answer.mask_logits, other.mask_logits, **LOGITS)
    assert (encoded.select([]).embeddings.shape[0], len(encoded.select([]))) == (0, 0)


@pytest.mark.parametrize("size", [(128, 256), (512, 1024), (200, 90)])
def test_upscale_returns_a_mask_to_its_place_in_the_image(backend, size):
    """A half plane x < c of the content, drawn in the square frame, comes back as x < c."""
    edge_x, edge_y = 0.375, 0.625
    scale_x, scale_y = backend.grid_scale(size)
    low = 4 * backend.grid_side
    centers = (torch.arange(low) + 0.5) / low
    logits = torch.stack([
        (edge_x * scale_x - centers)[None, :].expand(low, low),
        (edge_y * scale_y - centers)[:, None].expand(low, low),
    ])  # fmt: skip
    left, top = backend.upscale(logits, size) > 0
    x = (torch.arange(size[1]) + 0.5) / size[1]
    y = (torch.arange(size[0]) + 0.5) / size[0]
    cell_x, cell_y = 1 / (low * scale_x), 1 / (low * scale_y)
    sure_x, sure_y = (x - edge_x).abs() > cell_x, (y - edge_y).abs() > cell_y
    assert (left[:, sure_x] == (x < edge_x)[sure_x]).all()
    assert (top[sure_y] == (y < edge_y)[sure_y, None]).all()


def test_the_answer_depends_on_the_prompt_and_on_the_image(backend):
    encoded = backend.encode(*batch_of(image_of(128, 256, 1), image_of(128, 256, 2)))
    here, there = torch.tensor([[[[0.1, 0.2]]], [[[0.8, 0.9]]]])
    first, second = backend.prompt(encoded, [torch.cat([here, there]), here], features=True)
    for name in ("mask_logits", "iou_predictions", "features"):
        values = getattr(first, name)
        assert not torch.allclose(values[0], values[1], **LOGITS), name
        assert not torch.allclose(values[0], getattr(second, name)[0], **LOGITS), name


def test_features_are_the_image_tokens_after_the_librarys_two_way_transformer(backend):
    size, points = (128, 256), torch.rand(2, 3, 2)
    labels = torch.tensor([[1, 0, 1], [1, 1, 0]])
    encoded = backend.encode(image_of(*size)[None], [size])
    encoder, decoder = backend.decoder.prompt_encoder, backend.decoder.mask_decoder
    seen = []
    hook = decoder.transformer.register_forward_hook(
        lambda module, inputs, output: seen.append(output[1])
    )
    pixels = points * torch.tensor(backend.grid_scale(size)) * backend.image_side - 0.5
    sparse, dense = encoder(points=(pixels, labels), boxes=None, masks=None)
    finer = {"repeat_image": True, "high_res_features": list(encoded.finer_maps)}
    decoder(
        image_embeddings=encoded.embeddings,
        image_pe=encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        **(finer if encoded.finer_maps else {}),
    )
    hook.remove()
    (answer,) = backend.prompt(encoded, [points], [labels], masks=False, features=True)
    expected = seen[0].transpose(1, 2).reshape(2, -1, backend.grid_side, backend.grid_side)
    torch.testing.assert_close(answer.features, expected, **LOGITS)
    assert answer.mask_logits is None and answer.iou_predictions is None


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


@pytest.mark.parametrize("name", ["segment_anything", pytest.param("sam2", marks=needs_sam2)])
def test_a_chunk_size_below_one_is_refused(name):
    with pytest.raises(ConfigError, match="MAX_PROMPTS is 0"):
        build_small(name, max_prompts_per_chunk=0)
