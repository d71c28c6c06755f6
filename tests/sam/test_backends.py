"""What every backend does alike: batches, chunks, padding, precision, freezing, refusals."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from sam_cases import LOGITS, batch_of, build_smallest, image_of, needs_sam2
from torch import nn
from torch.profiler import ProfilerActivity, profile

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.sam import precision
from s4m_d2.sam.precision import ImageBudget, compute_dtype
from s4m_d2.transfers import TO_HOST

# What makes the host wait when its input is on a GPU, by its name in a profile.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique", "aten::masked_select")
NAMED = ("image_positional_embeddings", "point_embeddings")  # as transformers calls them
FIELDS = ("mask_logits", "iou_predictions", "features")


def mixed_prompts():
    """Points and labels of three images; 1, 2 and 3 clicks, padding anywhere, one image without."""
    points = [torch.rand(4, 3, 2), torch.zeros(0, 3, 2), torch.rand(3, 2, 2)]
    first = torch.tensor([[1, 1, 0], [1, -1, -1], [-1, 1, 0], [-1, -1, 1]])
    last = torch.tensor([[1, 0], [1, -1], [2, 3]])  # a box
    return points, [first, torch.zeros(0, 3, dtype=torch.long), last]


def three_images():
    return batch_of(image_of(128, 256, 1), image_of(64, 64, 2), image_of(100, 60, 3))


@pytest.mark.parametrize(
    ("max_images", "max_prompts", "masked"),
    [(3, 100, False), (2, 2, False), (0, 1, False), (3, 2, True)],
)
def test_prompts_of_a_batch_are_those_of_each_image_and_prompt_alone(
    backend, max_images, max_prompts, masked
):
    """Whatever shares a pass; padding points are neutral wherever they stand."""
    chunks = {"max_images_per_chunk": max_images, "max_prompts_per_chunk": max_prompts}
    parts = type(backend)(backend.sam, **chunks)
    points, labels = mixed_prompts()
    encoded = parts.encode(*three_images())
    shapes = [9 * torch.randn(len(p), *2 * (4 * backend.grid_side,)) for p in points]
    options = {"mask_prompts": shapes} if masked else {}
    together = parts.prompt(encoded, points, labels, features=True, **options)
    features = parts.prompt(encoded, points, labels, masks=False, features=True)
    for i, (image, size) in enumerate(zip(*three_images(), strict=True)):
        alone = backend.encode(image[None, :, : size[0], : size[1]], [size])
        mine = encoded.select([i])
        torch.testing.assert_close(mine.embeddings, alone.embeddings, **LOGITS)
        torch.testing.assert_close(mine.finer_maps, alone.finer_maps, **LOGITS)
        assert len(together[i].mask_logits) == len(points[i])
        for row, valid in enumerate(labels[i] >= 0):
            prompt = [points[i][row, valid][None]], [labels[i][row, valid][None]]
            options = {"mask_prompts": [shapes[i][row, None]]} if masked else {}
            (one,) = backend.prompt(alone, *prompt, features=True, **options)
            for name in FIELDS:
                found, expected = getattr(together[i], name)[row], getattr(one, name)[0]
                torch.testing.assert_close(found, expected, **LOGITS)
            if not masked:
                torch.testing.assert_close(features[i].features[row], one.features[0], **LOGITS)
        assert features[i].mask_logits is None and features[i].iou_predictions is None


def test_what_lies_in_the_padding_of_a_batch_changes_nothing(backend):
    images = [image_of(128, 256), image_of(256, 120)]
    black, sizes = batch_of(*images)
    white, _ = batch_of(*images, fill=255)
    first, second = backend.encode(black, sizes), backend.encode(white, sizes)
    torch.testing.assert_close(first.embeddings, second.embeddings)
    torch.testing.assert_close(first.finer_maps, second.finer_maps)


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


@pytest.mark.parametrize(
    "backend", ["segment_anything", pytest.param("sam2", marks=needs_sam2)], indirect=True
)
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
        ([torch.rand(1, 2, 2)], [torch.tensor([[1, -2]])], r"image 0 .*\[-2, 1\]"),
        ([torch.rand(1, 2, 2)], [torch.tensor([[1, 3]])], "image 0"),
        ([torch.rand(1, 4, 2)], [torch.tensor([[2, 3, 2, 3]])], "image 0"),
    ],
)
def test_prompts_of_the_wrong_shape_are_refused(backend, points, labels, message):
    encoded = backend.encode(image_of(64, 64)[None], [(64, 64)])
    with pytest.raises(InputError, match=message):
        backend.prompt(encoded, points, labels)


def test_on_the_cpu_an_images_embeddings_do_not_depend_on_the_batch(backend):
    images = [image_of(128, 256, 1), image_of(64, 64, 2), image_of(100, 60, 3)]
    together = backend.encode(*batch_of(*images))
    for i, image in enumerate(images):
        alone = backend.encode(*batch_of(image))
        assert torch.equal(together.select([i]).embeddings, alone.embeddings)
        for finer, other in zip(together.finer_maps, alone.finer_maps, strict=True):
            assert torch.equal(finer[i : i + 1], other)


@pytest.mark.parametrize(
    ("max_prompts", "token_bytes", "device", "expected"),
    [
        (256, 256 << 10, "cpu", 16),
        (7, 256 << 10, "cpu", 7),
        (256, 16 << 20, "cpu", 1),
        pytest.param(256, 16 << 10, "cuda", 256, marks=pytest.mark.gpu),
        pytest.param(256, 1 << 40, "cuda", 1, marks=pytest.mark.gpu),  # more than is free
    ],
)
def test_prompts_of_a_pass(max_prompts, token_bytes, device, expected):
    assert precision.prompts_per_pass(max_prompts, token_bytes, torch.device(device)) == expected


def test_neither_encoding_nor_prompting_waits(backend):
    images, sizes = three_images()
    points, labels = mixed_prompts()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        encoded = backend.encode(images, sizes)
        backend.prompt(encoded, points, labels, features=True)
        backend.prompt(encoded.select([2, 0]), [points[2], points[0]])
    names = [event.name for event in profiled.events()]
    assert "aten::linear" in names
    assert not [name for name in names if name.startswith(WAITS)]
    assert TO_HOST not in names


@pytest.mark.gpu
def test_on_a_gpu_only_labels_that_are_there_cost_a_wait(backend):
    there = type(backend)(copy.deepcopy(backend.sam).cuda())
    images, sizes = three_images()
    points, labels = mixed_prompts()
    images, points = images.cuda(), [p.cuda() for p in points]
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoded = there.encode(images, sizes)
        there.prompt(encoded, points, labels, features=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    labels = [x.cuda() for x in labels]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            there.prompt(encoded, points, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert ["synchronizing" in str(w.message) for w in caught].count(True) == 1


def test_the_precision_is_the_backends_own(backend):
    images, sizes = three_images()
    points, labels = mixed_prompts()
    exact, coarse = backend, type(backend)(backend.sam, precision="bfloat16")
    inside = []
    hook = backend.decoder.mask_decoder.iou_prediction_head.layers[0].register_forward_hook(
        lambda module, args, output: inside.append(output.dtype)
    )
    embeddings = exact.encode(images, sizes).embeddings
    with torch.autocast("cpu", torch.bfloat16):
        encoded = exact.encode(images, sizes)
        exact.prompt(encoded, points, labels)
    assert torch.equal(encoded.embeddings, embeddings)
    low = coarse.encode(images, sizes)
    assert low.embeddings.dtype == torch.float32 and not torch.equal(low.embeddings, embeddings)
    for answer in coarse.prompt(low, points, labels, features=True):
        assert {answer.mask_logits.dtype, answer.features.dtype} == {torch.float32}
    hook.remove()
    half = len(inside) // 2
    assert set(inside[:half]) == {torch.float32} and set(inside[half:]) == {torch.bfloat16}


def test_positions_keep_full_precision(backend):
    coarse = type(backend)(backend.sam, precision="bfloat16")
    seen = []
    hook = backend.decoder.mask_decoder.transformer.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(inputs[1:] or [named[x] for x in NAMED]),
        with_kwargs=True,
    )
    encoded = coarse.encode(*three_images())
    points, labels = mixed_prompts()
    for one in (coarse, backend):
        one.prompt(encoded, points, labels)
    hook.remove()
    half = len(seen) // 2
    for low, full in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(low[0], full[0]) and torch.equal(low[1], full[1])


@pytest.mark.parametrize(
    ("precision", "device", "capability", "expected"),
    [
        ("auto", "cpu", None, torch.float32),
        ("auto", "cuda", (8, 0), torch.bfloat16),
        ("auto", "cuda", (9, 0), torch.bfloat16),
        ("auto", "cuda", (7, 5), torch.float16),
        ("float32", "cuda", (9, 0), torch.float32),
        ("float16", "cuda", (9, 0), torch.float16),
        ("bfloat16", "cpu", None, torch.bfloat16),
    ],
)
def test_what_a_precision_means(monkeypatch, precision, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype(precision, torch.device(device)) == expected


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="MAX_PROMPTS is 0"):
        build_smallest("segment_anything", max_prompts_per_chunk=0)
    with pytest.raises(ConfigError, match="PRECISION is 'double'.*auto, float32"):
        build_smallest("segment_anything", precision="double")
    with pytest.raises(ConfigError, match="MAX_IMAGES is -1"):
        build_smallest("segment_anything", max_images_per_chunk=-1)


def test_the_budget_of_images_follows_what_the_first_one_needed(monkeypatch):
    """100 bytes an image; half of the free memory, the unused part of the reserved counted."""
    state = {"allocated": 1000, "peak": 9999, "reserved": 1200, "free": 400}
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: state["reserved"])
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (state["free"], 5000))
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(
        cuda, "reset_peak_memory_stats", lambda device: state.update(peak=state["allocated"])
    )
    device, budget = torch.device("cuda"), ImageBudget()
    assert budget.take(8, device) == 1
    with budget.observed(1, device):
        state["peak"] = 1100
    assert budget.take(7, device) == 3  # (400 + 200) / 2 / 100
    assert budget.take(2, device) == 2
    state["free"] = 0
    with budget.observed(1, device):
        state["peak"] = 5000  # later calls do not count
    assert budget.take(7, device) == 1
    state["reserved"] = 1000
    assert budget.take(7, device) == 1  # never none
    assert ImageBudget(3).take(8, device) == 3
    assert ImageBudget().take(8, torch.device("cpu")) == 1
