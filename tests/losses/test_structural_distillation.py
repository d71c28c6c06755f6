"""Structural distillation against a literal double loop, and what holds for any batch."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from torch import Tensor

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.losses.structural_distillation import (
    StructuralDistillation,
    build_distillation,
    sample_query_points,
)

SIDE = 6
CHANNELS = 5


@dataclass
class FakeOutput:
    features: Tensor


class FakeBackend:
    """Features that depend on the image and the prompt; stretches the image or pads it."""

    grid_side = SIDE

    def __init__(self, padded: bool, prompt_dependent: bool = True) -> None:
        self.padded = padded
        self.prompt_dependent = prompt_dependent
        self.base = torch.randn(8, CHANNELS, SIDE, SIDE, generator=seeded(99)).requires_grad_()
        self.tilt = torch.randn(2, CHANNELS, SIDE, SIDE, generator=seeded(98)).requires_grad_()
        self.largest_call = 0

    def encode(self, images, image_sizes):
        assert len(images) == len(image_sizes)
        return images.mean(dim=(1, 2, 3))

    def features(self, image_mean: Tensor, point: Tensor) -> Tensor:
        base = self.base[int(image_mean) % len(self.base)]
        return base + self.prompt_dependent * (point[:, None, None, None] * self.tilt).sum(0)

    def prompt(self, encoded, points, labels, *, multimask=True, masks=True, features=False):
        assert features and not masks and labels is None
        self.largest_call = max(self.largest_call, sum(map(len, points)))
        outputs = []
        for mean, clicks in zip(encoded, points, strict=True):
            assert clicks.shape[1:] == (1, 2)
            outputs.append(FakeOutput(torch.stack([self.features(mean, c[0]) for c in clicks])))
        return outputs

    def grid_scale(self, image_size):
        height, width = image_size
        longest = max(image_size)
        return (width / longest, height / longest) if self.padded else (1.0, 1.0)

    def content_mask(self, image_size):
        sx, sy = self.grid_scale(image_size)
        centers = (torch.arange(SIDE) + 0.5) / SIDE
        return (centers < sy)[:, None] & (centers < sx)[None, :]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(sizes, padded_size, seed=0):
    """Mask features at a quarter of the padded size, images of different means, masks."""
    generator = seeded(seed)
    h, w = padded_size[0] // 4, padded_size[1] // 4
    features = torch.randn(len(sizes), CHANNELS, h, w, generator=generator).requires_grad_()
    images = torch.stack([torch.full((3, *padded_size), float(i)) for i in range(len(sizes))])
    masks = [torch.rand(2, *padded_size, generator=generator) > 0.7 for _ in sizes]
    return features, images, sizes, masks


def read_literally(values: Tensor, x: float, y: float, columns: int, rows: int) -> Tensor:
    """Bilinear value of (C, h, w) at (x, y) in cells, using the first rows and columns only."""
    x = min(max(x - 0.5, 0.0), columns - 1.0)
    y = min(max(y - 0.5, 0.0), rows - 1.0)
    x0, y0 = math.floor(x), math.floor(y)
    x1, y1 = min(x0 + 1, columns - 1), min(y0 + 1, rows - 1)
    top = values[:, y0, x0] * (1 - (x - x0)) + values[:, y0, x1] * (x - x0)
    bottom = values[:, y1, x0] * (1 - (x - x0)) + values[:, y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def reference_loss(backend, features, images, sizes, all_points, delta) -> float:
    """The formula, one image, one point and one grid cell at a time."""
    per_image = []
    features = features.detach().double()
    padded_h, padded_w = images.shape[2:]
    for b, (height, width) in enumerate(sizes):
        sx, sy = backend.grid_scale((height, width))
        content = backend.content_mask((height, width))
        rows, columns = int(content.any(1).sum()), int(content.any(0).sum())
        map_h, map_w = features.shape[2:]
        teacher = torch.zeros(CHANNELS, SIDE, SIDE, dtype=torch.float64)
        for j_y in range(rows):
            for j_x in range(columns):
                x = (j_x + 0.5) / SIDE / sx * width / padded_w * map_w
                y = (j_y + 0.5) / SIDE / sy * height / padded_h * map_h
                shown_w = math.ceil(width * map_w / padded_w)
                shown_h = math.ceil(height * map_h / padded_h)
                teacher[:, j_y, j_x] = read_literally(features[b], x, y, shown_w, shown_h)
        terms = []
        for point in all_points[b]:
            x, y = float(point[0]) * sx * SIDE, float(point[1]) * sy * SIDE
            sam = backend.features(images[b].mean(), point).detach().double()
            sam_at_point = read_literally(sam, x, y, columns, rows)
            teacher_at_point = read_literally(teacher, x, y, columns, rows)
            for j_y in range(rows):
                for j_x in range(columns):
                    difference = abs(
                        cosine(sam_at_point, sam[:, j_y, j_x])
                        - cosine(teacher_at_point, teacher[:, j_y, j_x])
                    )
                    linear = delta * (difference - 0.5 * delta)
                    terms.append(0.5 * difference**2 if difference <= delta else linear)
        per_image.append(sum(terms) / len(terms))
    return sum(per_image) / len(per_image)


CASES = {
    "square": (False, [(24, 24)], (24, 24)),
    "stretched, non-square": (False, [(16, 32), (32, 12)], (32, 32)),
    "SAM pads, image fills its tensor": (True, [(16, 32)], (16, 32)),
    "SAM pads and the batch pads": (True, [(16, 32), (27, 13), (31, 32)], (32, 36)),
}


@pytest.mark.parametrize("delta", [1.0, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_double_loop_over_points_and_content_cells(case, delta):
    padded, sizes, padded_size = CASES[case]
    backend = FakeBackend(padded)
    batch = make_batch(sizes, padded_size)
    loss_fn = StructuralDistillation(
        backend=backend, weight=0.5, num_points=9, huber_delta=delta, max_prompts=7
    )
    loss = loss_fn(*batch, [seeded(i) for i in range(len(sizes))])["loss_sd"]

    points = [
        sample_query_points(mask, size, 9, 4, seeded(i))
        for i, (mask, size) in enumerate(zip(batch[3], sizes, strict=True))
    ]
    expected = 0.5 * reference_loss(backend, *batch[:3], points, delta)
    assert loss.ndim == 0
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_square_images_use_the_ordinary_bilinear_resize():
    """No prompt dependence and the resized features themselves as SAM's: nothing to distill."""
    backend = FakeBackend(padded=False, prompt_dependent=False)
    features = torch.randn(1, CHANNELS, 15, 15, generator=seeded(3))
    resized = F.interpolate(features, (SIDE, SIDE), mode="bilinear", align_corners=False)
    backend.base = resized.expand(8, -1, -1, -1)
    loss_fn = StructuralDistillation(backend=backend, num_points=20)
    masks = [torch.zeros(0, 60, 60, dtype=torch.bool)]
    loss = loss_fn(features, torch.zeros(1, 3, 60, 60), [(60, 60)], masks, [seeded(0)])
    assert float(loss["loss_sd"]) == pytest.approx(0.0, abs=1e-10)


def test_padding_enters_on_neither_side():
    backend = FakeBackend(padded=True)
    features, images, sizes, masks = make_batch([(16, 32), (32, 20)], (32, 32))
    loss_fn = StructuralDistillation(backend=backend, num_points=64)
    before = loss_fn(features, images, sizes, masks, [seeded(0), seeded(1)])["loss_sd"]
    before.backward()
    assert features.grad[0, :, :4].abs().sum() > 0
    assert features.grad[0, :, 4:].abs().sum() == 0  # below the content of the first image
    assert features.grad[1, :, :, 5:].abs().sum() == 0  # right of the content of the second

    with torch.no_grad():
        for b, size in enumerate(sizes):
            backend.base[b, :, ~backend.content_mask(size)] += 100.0
    after = loss_fn(features, images, sizes, masks, [seeded(0), seeded(1)])["loss_sd"]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=0)


def test_gradients_reach_the_mask_features_only():
    backend = FakeBackend(padded=False)
    features, images, sizes, masks = make_batch([(24, 24)], (24, 24))
    images.requires_grad_()
    loss_fn = StructuralDistillation(backend=backend, num_points=8)
    loss_fn(features, images, sizes, masks, [seeded(0)])["loss_sd"].backward()
    assert features.grad.abs().sum() > 0
    assert torch.isfinite(features.grad).all()
    assert images.grad is None and backend.base.grad is None and backend.tilt.grad is None


def test_descending_the_gradient_reproduces_sams_similarities():
    backend = FakeBackend(padded=False, prompt_dependent=False)
    features, images, sizes, masks = make_batch([(24, 24)], (24, 24))
    loss_fn = StructuralDistillation(backend=backend, num_points=32)
    optimizer = torch.optim.Adam([features], lr=0.1)
    losses = []
    for _ in range(120):
        loss = loss_fn(features, images, sizes, masks, [seeded(0)])["loss_sd"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


def test_an_image_too_thin_for_a_grid_cell_costs_nothing():
    backend = FakeBackend(padded=True)
    features, images, _, masks = make_batch([(1, 32)], (32, 32))
    assert not backend.content_mask((1, 32)).any()
    loss_fn = StructuralDistillation(backend=backend, num_points=8)
    loss = loss_fn(features, images, [(1, 32)], masks, [seeded(0)])["loss_sd"]
    loss.backward()
    assert loss.item() == 0 and not features.grad.any()


def test_autocast_does_not_change_the_arithmetic():
    backend = FakeBackend(padded=False)
    features, images, sizes, masks = make_batch([(24, 24)], (24, 24))
    half = features.detach().bfloat16().requires_grad_()
    loss_fn = StructuralDistillation(backend=backend, num_points=16)
    plain = loss_fn(half.detach().float(), images, sizes, masks, [seeded(0)])["loss_sd"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss_fn(half, images, sizes, masks, [seeded(0)])["loss_sd"]
    mixed.backward()
    assert mixed.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.detach(), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_prompts", [1, 5, 1000])
def test_chunks_of_prompts_bound_the_memory_and_change_nothing(max_prompts):
    sizes = [(16, 32), (32, 20)]
    batch = make_batch(sizes, (32, 32))
    whole, chunked = FakeBackend(padded=True), FakeBackend(padded=True)
    generators = [[seeded(0), seeded(1)] for _ in range(2)]
    expected = StructuralDistillation(backend=whole, num_points=11)(*batch, generators[0])
    loss_fn = StructuralDistillation(backend=chunked, num_points=11, max_prompts=max_prompts)
    torch.testing.assert_close(loss_fn(*batch, generators[1]), expected)
    assert chunked.largest_call <= max(max_prompts, len(sizes))


def test_a_batch_is_the_mean_of_its_images():
    sizes = [(16, 32), (32, 20), (32, 32)]
    features, images, _, masks = make_batch(sizes, (32, 32))
    masks[1] = masks[1][:0]
    loss_fn = StructuralDistillation(backend=FakeBackend(padded=True), num_points=10)
    batch = loss_fn(features, images, sizes, masks, [seeded(i) for i in range(3)])["loss_sd"]
    single = [
        loss_fn(features[i, None], images[i, None], sizes[i : i + 1], [masks[i]], [seeded(i)])
        for i in range(3)
    ]
    torch.testing.assert_close(batch, sum(loss["loss_sd"] for loss in single) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch[2].append((1, 1)), "same images"),
        (lambda batch: batch[3].__setitem__(0, torch.ones(1, 8, 8).bool()), "image 0"),
    ],
)
def test_disagreeing_inputs_are_named(change, message):
    batch = list(make_batch([(24, 24)], (24, 24)))
    change(batch)
    with pytest.raises(InputError, match=message):
        StructuralDistillation(backend=FakeBackend(padded=False))(*batch)


@pytest.mark.parametrize(
    "argument",
    [{"num_points": 0}, {"foreground_fraction": 1.5}, {"huber_delta": 0.0}, {"max_prompts": 0}],
)
def test_arguments_out_of_range_are_named(argument):
    with pytest.raises(InputError, match=next(iter(argument))):
        StructuralDistillation(backend=None, **argument)


def test_the_config_selects_and_parametrizes_the_loss():
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.S4M.DISTILL.NUM_POINTS = 10
    cfg.S4M.DISTILL.FOREGROUND_FRACTION = 0.3
    cfg.S4M.DISTILL.WEIGHT = 2.5
    backend = FakeBackend(padded=False)
    loss_fn = build_distillation(cfg, backend)
    assert isinstance(loss_fn, StructuralDistillation) and loss_fn.backend is backend
    assert (loss_fn.num_points, loss_fn.num_foreground, loss_fn.weight) == (10, 3, 2.5)
    cfg.S4M.DISTILL.NAME = "Unheard"
    with pytest.raises(ConfigError, match=r"Unheard.*StructuralDistillation"):
        build_distillation(cfg, backend)
