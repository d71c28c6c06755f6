"""What every backend does alike: batches, chunks, padding, precision, freezing, refusals."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from sam_cases import CLOSE, batch_of, build_small, image_of
from torch import nn

from s4m_d2.errors import InputError
from s4m_d2.sam.point_prompts import ImageBudget, compute_dtype, prompts_per_pass

NAMED = ("image_positional_embeddings", "point_embeddings")  # as transformers calls them
FIELDS = ("mask_logits", "iou_predictions")


def mixed_prompts():
    """Points and labels of three images; 1, 2 and 3 clicks, padding anywhere, one image without."""
    points = [torch.rand(4, 3, 2), torch.zeros(0, 3, 2), torch.rand(3, 2, 2)]
    first = torch.tensor([[1, 1, 0], [1, -1, -1], [-1, 1, 0], [-1, -1, 1]])
    last = torch.tensor([[1, 0], [1, -1], [2, 3]])  # a box
    return points, [first, torch.zeros(0, 3, dtype=torch.long), last]


def three_images(fill=0):
    return batch_of(image_of(128, 256, 1), image_of(64, 64, 2), image_of(100, 60, 3), fill=fill)


@pytest.mark.parametrize(
    ("max_images", "max_prompts", "masked"), [(3, 100, False), (2, 2, False), (0, 2, True)]
)
def test_prompts_of_a_batch_are_those_of_each_image_and_prompt_alone(
    backend, max_images, max_prompts, masked
):
    """Whatever shares a pass; padding is neutral, that of points and that of images."""
    parts = type(backend)(backend.sam, max_images=max_images, max_prompts=max_prompts)
    points, labels = mixed_prompts()
    encoded = parts.encode(*three_images(fill=255))
    shapes = [9 * torch.randn(len(p), *2 * (4 * backend.grid_side,)) for p in points]
    options = {"mask_prompts": shapes} if masked else {}
    together = parts.prompt(encoded, points, labels, **options)
    features = parts.prompted_features(encoded, [p[:, 0] for p in points])
    for i, (image, size) in enumerate(zip(*three_images(), strict=True)):
        alone = backend.encode(image[None, :, : size[0], : size[1]], [size])
        exactly = {"atol": 0, "rtol": 0} if max_images == 0 else CLOSE  # one by one on the CPU
        torch.testing.assert_close(encoded.embeddings[i : i + 1], alone.embeddings, **exactly)
        for maps, own in zip(encoded.finer_maps, alone.finer_maps, strict=True):
            torch.testing.assert_close(maps[i : i + 1], own, **exactly)
        assert len(together[i].mask_logits) == len(points[i])
        for row, valid in enumerate(labels[i] >= 0):
            prompt = [points[i][row, valid][None]], [labels[i][row, valid][None]]
            options = {"mask_prompts": [shapes[i][row, None]]} if masked else {}
            (one,) = backend.prompt(alone, *prompt, **options)
            for name in FIELDS:
                found, expected = getattr(together[i], name)[row], getattr(one, name)[0]
                torch.testing.assert_close(found, expected, **CLOSE)
            [of_click] = backend.prompted_features(alone, [points[i][row, :1]])
            torch.testing.assert_close(features[i][row], of_click[0], **CLOSE)


def test_no_prompts_at_all(backend):
    encoded = backend.encode(image_of(128, 256)[None], [(128, 256)])
    (answer,) = backend.prompt(encoded, [torch.zeros(0, 1, 2)])
    channels, grid = encoded.embeddings.shape[1], backend.grid_side
    assert answer.mask_logits.shape == (0, 3, 4 * grid, 4 * grid)
    assert answer.iou_predictions.shape == (0, 3)
    [features] = backend.prompted_features(encoded, [torch.zeros(0, 2)])
    assert features.shape == (0, channels, grid, grid)
    assert backend.upscale(answer.mask_logits[:, 0], (128, 256)).shape == (0, 128, 256)


def test_the_model_is_frozen_and_stays_out_of_its_holder(backend):
    holder = nn.Module()
    holder.sam = backend
    assert list(holder.state_dict()) == []
    assert not backend.sam.training
    assert not any(p.requires_grad for p in backend.sam.parameters())
    encoded = backend.encode(image_of(128, 256)[None].float().requires_grad_(), [(128, 256)])
    [features] = backend.prompted_features(encoded, [torch.rand(1, 2)])
    assert not encoded.embeddings.requires_grad and not features.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (features.mean() * weight).sum().backward()  # no inference-mode tensor
    assert weight.grad is not None


def test_inputs_that_disagree_are_refused():
    backend = build_small("segment_anything")
    encoded = backend.encode(image_of(64, 64)[None], [(64, 64)])
    for shapes, labels in (
        ([], None),
        ([(2, 2)], None),
        ([(2, 1, 2)], [[[1, 1], [1, 1]]]),
        ([(1, 2, 2)], [[[1, -2]]]),
        ([(1, 2, 2)], [[[1, 3]]]),
        ([(1, 4, 2)], [[[2, 3, 2, 3]]]),
    ):
        labels = labels and [torch.tensor(of_image) for of_image in labels]
        with pytest.raises(InputError, match="image"):
            backend.prompt(encoded, [torch.rand(shape) for shape in shapes], labels)


@pytest.mark.gpu
def test_on_a_gpu_only_labels_that_are_there_cost_a_wait(backend):
    there = type(backend)(copy.deepcopy(backend.sam).cuda())
    images, sizes = three_images()
    points, labels = mixed_prompts()
    images, points = images.cuda(), [p.cuda() for p in points]
    on_device = [x.cuda() for x in labels]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            encoded = there.encode(images, sizes)
            there.prompt(encoded, points, labels)
            there.prompted_features(encoded, [p[:, 0] for p in points])
            there.prompt(encoded, points)
            without_labels = [str(w.message) for w in caught]
            there.prompt(encoded, points, on_device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not any("synchronizing" in text for text in without_labels)
    assert ["synchronizing" in str(w.message) for w in caught].count(True) == 1


def test_the_precision_is_the_backends_own_and_positions_keep_all_of_it(backend):
    """A caller's autocast does not count. Positions are seen where the decoder works."""
    points, labels = mixed_prompts()
    coarse = type(backend)(backend.sam, precision="bfloat16")
    positions = []
    hook = backend.decoder.mask_decoder.transformer.register_forward_pre_hook(
        lambda module, args, named: positions.append(args[1:] or [named[x] for x in NAMED]),
        with_kwargs=True,
    )

    def answers(sam):
        encoded = sam.encode(*three_images())
        (first, *_) = sam.prompt(encoded, points, labels)
        return encoded.embeddings, first.mask_logits, first.iou_predictions

    exact = answers(backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, exact, answers(backend)))
    for low, value in zip(answers(coarse), exact, strict=True):
        assert low.dtype == torch.float32 and not torch.equal(low, value)
    hook.remove()
    third = len(positions) // 3
    for first, last in zip(positions[:third], positions[-third:], strict=True):
        assert all(map(torch.equal, first, last))


@pytest.mark.parametrize(
    ("precision", "device", "capability", "expected"),
    [
        ("auto", "cpu", None, torch.float32),
        ("auto", "cuda", (8, 0), torch.bfloat16),
        ("auto", "cuda", (7, 5), torch.float16),
        ("float32", "cuda", (9, 0), torch.float32),
        ("float16", "cuda", (9, 0), torch.float16),
    ],
)
def test_what_a_precision_means(monkeypatch, precision, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype(precision, torch.device(device)) == expected


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

    def sizes(budget, count, device="cuda", peak=5000):
        found = []
        for chunk in budget.chunks(count, torch.device(device)):
            state["peak"] = peak  # of what is done with the chunk
            found.append(len(range(count)[chunk]))
        return found

    assert prompts_per_pass(256, 1, torch.device("cuda")) == 18  # of 16 bytes each: 600 / 2 / 16
    assert prompts_per_pass(256, 1 << 40, torch.device("cuda")) == 1
    assert prompts_per_pass(7, 256 << 10, torch.device("cpu")) == 7
    budget = ImageBudget()
    assert sizes(budget, 8, peak=1100) == [1, 3, 3, 1]  # (400 + 200) / 2 / 100
    assert sizes(budget, 2) == [2]
    state["free"] = 0
    assert sizes(budget, 2) == [1, 1]
    state["reserved"] = 1000
    assert sizes(budget, 2) == [1, 1]  # never none
    assert sizes(ImageBudget(3), 8) == [3, 3, 2]
    assert sizes(ImageBudget(), 2, "cpu") == [1, 1]
