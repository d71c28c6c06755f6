"""Batches in chunks: how often the model is called, that nothing waits, and that answers agree."""

from __future__ import annotations

import copy

import pytest
import torch
from sam_cases import LOGITS, batch_of, build_smallest, image_of, needs_sam2
from torch.profiler import ProfilerActivity, profile

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.sam import precision
from s4m_d2.sam.precision import ImageBudget, compute_dtype
from s4m_d2.sam.prompt_groups import PADDING_LABEL, group_prompts
from s4m_d2.transfers import TO_HOST

# What makes the host wait when its input is on a GPU, by its name in a profile.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique", "aten::masked_select")


class Calls:
    """Counts the inputs of each call of a module."""

    def __init__(self, module):
        self.sizes = []
        self.hook = module.register_forward_pre_hook(
            lambda module, inputs: self.sizes.append(len(inputs[0]))
        )


@pytest.fixture(scope="module", params=["segment_anything", pytest.param("sam2", marks=needs_sam2)])
def backend(request):
    return build_smallest(request.param)


@pytest.fixture
def calls(backend):
    """(of the image encoder, of the decoder's transformer)."""
    both = Calls(backend.sam.image_encoder), Calls(backend.decoder.mask_decoder.transformer)
    yield both
    for one in both:
        one.hook.remove()


def mixed_prompts():
    """Points and labels of three images; 1, 2 and 3 clicks, padding anywhere, one image without."""
    points = [torch.rand(4, 3, 2), torch.zeros(0, 3, 2), torch.rand(2, 2, 2)]
    first = torch.tensor([[1, 1, 0], [1, -1, -1], [-1, 1, 0], [-1, -1, 1]])
    return points, [first, torch.zeros(0, 3, dtype=torch.long), torch.tensor([[1, 0], [1, -1]])]


def three_images():
    return batch_of(image_of(128, 256, 1), image_of(64, 64, 2), image_of(100, 60, 3))


def test_a_batch_is_one_call_of_the_encoder_and_one_of_the_decoder_for_each_length(backend, calls):
    encoder, decoder = calls
    points, labels = mixed_prompts()
    encoded = type(backend)(backend.sam, max_images_per_chunk=8).encode(*three_images())
    assert encoder.sizes == [3]
    backend.prompt(encoded, points, labels)
    assert decoder.sizes == [3, 2, 1]  # prompts of 1, 2 and 3 clicks
    decoder.sizes.clear()
    backend.prompt(encoded, points)
    assert decoder.sizes == [2, 4]  # without labels every point counts
    decoder.sizes.clear()
    backend.prompt(encoded, [torch.zeros(0, 1, 2)] * 3)
    assert decoder.sizes == []


def test_chunks_are_as_large_as_asked_for_and_agree(backend, calls):
    whole = type(backend)(backend.sam, max_images_per_chunk=3)
    parts = type(backend)(backend.sam, max_images_per_chunk=2, max_prompts_per_chunk=2)
    encoder, decoder = calls
    points, labels = mixed_prompts()
    encoded = whole.encode(*three_images())
    encoder.sizes.clear()
    pieces = parts.encode(*three_images())
    assert encoder.sizes == [2, 1]
    torch.testing.assert_close(pieces.embeddings, encoded.embeddings, **LOGITS)
    torch.testing.assert_close(pieces.finer_maps, encoded.finer_maps, **LOGITS)
    assert pieces.image_sizes == encoded.image_sizes
    answers = whole.prompt(encoded, points, labels, features=True)
    decoder.sizes.clear()
    for one, other in zip(
        answers, parts.prompt(pieces, points, labels, features=True), strict=True
    ):
        torch.testing.assert_close(other.mask_logits, one.mask_logits, **LOGITS)
        torch.testing.assert_close(other.iou_predictions, one.iou_predictions, **LOGITS)
        torch.testing.assert_close(other.features, one.features, **LOGITS)
    assert decoder.sizes == [2, 1, 2, 1]


@pytest.mark.parametrize("max_prompts", [1, 4, 100])
def test_features_alone_are_those_that_come_with_masks(backend, max_prompts):
    """Prompts of 1 to 3 clicks over several images, in passes of one image and of more."""
    parts = type(backend)(backend.sam, max_prompts_per_chunk=max_prompts)
    points, labels = mixed_prompts()
    encoded = backend.encode(*three_images())
    answers = backend.prompt(encoded, points, labels, features=True)
    alone = parts.prompt(encoded, points, labels, masks=False, features=True)
    for one, other in zip(answers, alone, strict=True):
        torch.testing.assert_close(other.features, one.features, **LOGITS)


def test_on_the_cpu_an_images_embeddings_do_not_depend_on_the_batch(backend):
    images = [image_of(128, 256, 1), image_of(64, 64, 2), image_of(100, 60, 3)]
    together = backend.encode(*batch_of(*images))
    for i, image in enumerate(images):
        alone = backend.encode(*batch_of(image))
        assert torch.equal(together.select([i]).embeddings, alone.embeddings)
        for finer, other in zip(together.finer_maps, alone.finer_maps, strict=True):
            assert torch.equal(finer[i : i + 1], other)


def test_on_the_cpu_passes_stay_small_unless_the_config_says_so(backend, calls, monkeypatch):
    encoder, decoder = calls
    encoded = backend.encode(*three_images())
    assert encoder.sizes == [1, 1, 1]
    monkeypatch.setattr(precision, "CPU_PASS_BYTES", 2 * encoded.embeddings[0].nbytes)
    points = [torch.rand(3, 1, 2), torch.rand(0, 1, 2), torch.rand(2, 1, 2)]
    backend.prompt(encoded, points)
    type(backend)(backend.sam, max_prompts_per_chunk=1).prompt(encoded, points[:1] + points[:2])
    assert decoder.sizes == [2, 2, 1] + 6 * [1]


@pytest.mark.parametrize(
    ("max_prompts", "token_bytes", "device", "expected"),
    [
        (256, 256 << 10, "cpu", 16),
        (7, 256 << 10, "cpu", 7),
        (256, 16 << 20, "cpu", 1),
        (256, 16 << 20, "cuda", 256),
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
    points = [p.cuda() for p in points]
    there.prompt(there.encode(images.cuda(), sizes), points, labels)  # sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoded = there.encode(images.cuda(), sizes)
        there.prompt(encoded, points, labels, features=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        there.prompt(encoded, points, [x.cuda() for x in labels])
    assert [event.name for event in profiled.events()].count(TO_HOST) == 1


@pytest.mark.parametrize("max_prompts", [1, 2, 5, 100])
def test_groups_hold_every_valid_point_once_in_its_order(max_prompts):
    _, labels = mixed_prompts()
    arrays = [x.numpy() for x in labels]
    flat = [label for array in arrays for label in array.ravel().tolist()]
    starts = [0, 12, 12]  # of the images' points
    rows_of = [(i, r) for i, array in enumerate(arrays) for r in range(len(array))]
    seen = {}
    for group in group_prompts(arrays, max_prompts):
        assert len(group) <= max_prompts and (group.rows[1:] > group.rows[:-1]).all()
        for row, image, points, values in zip(*group.parts, strict=True):
            assert rows_of[row][0] == image and row not in seen
            assert [flat[p] for p in points] == values.tolist()
            seen[int(row)] = points.tolist()
    for row, (image, r) in enumerate(rows_of):
        width = arrays[image].shape[1]
        first = starts[image] + r * width
        expected = [first + c for c in range(width) if flat[first + c] != PADDING_LABEL]
        assert seen[row] == expected


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
    assert set(inside[:3]) == {torch.float32} and set(inside[3:]) == {torch.bfloat16}


def test_positions_keep_full_precision(backend):
    coarse = type(backend)(backend.sam, precision="bfloat16")
    seen = []
    hook = backend.decoder.mask_decoder.transformer.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[1:])
    )
    encoded = coarse.encode(*three_images())
    points, labels = mixed_prompts()
    for one in (coarse, backend):
        one.prompt(encoded, points, labels)
    hook.remove()
    for low, full in zip(seen[:3], seen[3:], strict=True):
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


def test_wrong_labels_are_told_with_their_values(backend):
    encoded = backend.encode(*batch_of(image_of(64, 64)))
    with pytest.raises(InputError, match=r"image 0 has point labels \[-2, 1\]"):
        backend.prompt(encoded, [torch.rand(1, 2, 2)], [torch.tensor([[1, -2]])])
