"""Structural distillation against literal double-precision loops, for any sizes; query points."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from literal_distillation import CHANNELS, RandomSam, distillation_loss
from scipy.stats import chisquare, kstest
from seeds import generators, seeded

from s4m_d2.engine.config_file import load_config
from s4m_d2.losses import StructuralDistillation, build_distillation
from s4m_d2.losses.structural_distillation import sample_query_points

STRIDE = 4
WEIGHT = 0.5


@dataclass(frozen=True)
class Case:
    """Sizes of a random batch; SAM pads or stretches."""

    sizes: tuple[tuple[int, int], ...]
    extra: tuple[int, int]  # rows and columns of padding in cells of the mask features
    pads: bool
    grid_side: int
    instances: int
    num_points: int
    seed: int
    delta: float = 1.0

    @property
    def padded_size(self):
        """A multiple of the stride that holds every content."""
        return tuple(
            STRIDE * (-(-max(size[axis] for size in self.sizes) // STRIDE) + self.extra[axis])
            for axis in (0, 1)
        )


side = st.integers(1, 40)
cases = st.builds(
    Case,
    sizes=st.lists(st.tuples(side, side), min_size=1, max_size=3).map(tuple),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    pads=st.booleans(),
    grid_side=st.integers(1, 8),
    instances=st.integers(0, 2),
    num_points=st.integers(1, 6),
    seed=st.integers(0, 2**20),
    delta=st.sampled_from([1.0, 1.0, 0.1]),
)
SQUARE = Case(((24, 24),), (0, 0), False, 6, 2, 9, seed=0)
STRETCHED = Case(((16, 32), (32, 12)), (0, 0), False, 6, 2, 9, seed=1)
PADDED = Case(((16, 32), (27, 13), (31, 32)), (0, 1), True, 6, 1, 9, seed=2)
TOO_THIN = Case(((1, 40), (40, 30)), (1, 0), True, 6, 1, 4, seed=3)  # fills no cell of the grid


def make_batch(case):
    """Mask features, images of means 0, 1, 2, and masks in the padded frame."""
    rng = np.random.default_rng(case.seed)
    height, width = case.padded_size
    batch = len(case.sizes)
    features = rng.normal(size=(batch, CHANNELS, height // STRIDE, width // STRIDE))
    images = torch.arange(batch, dtype=torch.float32)[:, None, None, None]
    masks = torch.from_numpy(rng.random((batch, case.instances, height, width)) < 0.2)
    return (
        torch.from_numpy(features).float().requires_grad_(),
        images.expand(batch, 3, height, width).clone(),
        list(case.sizes),
        list(masks),
    )


def run(case):
    """The package's loss, a function of the mask features that is the literal one, and SAM."""
    backend = RandomSam(case.grid_side, pads=case.pads, seed=case.seed)
    batch = make_batch(case)
    loss_fn = StructuralDistillation(
        backend=backend,
        weight=WEIGHT,
        num_points=case.num_points,
        huber_delta=case.delta,
        max_prompts=5,
    )
    draws = [generators(len(case.sizes), case.seed) for _ in range(2)]
    loss = loss_fn(*batch, draws[0])["loss_sd"]
    assert backend.largest_call <= max(5, len(case.sizes)), "chunks bound the memory"
    points = [
        sample_query_points(mask, size, loss_fn.num_points, loss_fn.num_foreground, rng).tolist()
        for mask, size, rng in zip(batch[3], case.sizes, draws[1], strict=True)
    ]

    def literal(features):
        return WEIGHT * distillation_loss(
            backend, features, case.sizes, case.padded_size, points, case.delta
        )

    return loss, batch[0], literal, backend


@settings(max_examples=50)
@given(cases)
@example(SQUARE)
@example(STRETCHED)
@example(PADDED)
@example(TOO_THIN)
def test_the_loss_equals_the_loops_of_the_method(case):
    loss, features, literal, _ = run(case)
    expected = literal(features.detach().double().numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("case", [SQUARE, STRETCHED, PADDED, TOO_THIN])
def test_the_gradient_is_the_slope_of_the_loops(case):
    """Central differences of the literal loss, along a few directions."""
    loss, features, literal, sam = run(case)
    loss.backward()
    assert sam.base.grad is None and sam.tilt.grad is None
    center, slope = (t.detach().double().numpy() for t in (features, features.grad))
    rng = np.random.default_rng(case.seed + 1)
    for _ in range(3):
        direction = rng.normal(size=center.shape)
        step = 1e-6 * direction
        expected = (literal(center + step) - literal(center - step)) / 2e-6
        assert expected != 0
        assert (slope * direction).sum() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_autocast_does_not_change_the_arithmetic():
    features, *batch = make_batch(SQUARE)
    half = features.detach().bfloat16().requires_grad_()
    loss_fn = StructuralDistillation(backend=RandomSam(6, pads=False), num_points=16)
    plain = loss_fn(half.detach().float(), *batch, generators(1))["loss_sd"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss_fn(half, *batch, generators(1))["loss_sd"]
    mixed.backward()
    assert mixed.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.detach(), plain, rtol=1e-6, atol=0)


def test_the_config_selects_and_parametrizes_the_loss():
    settings = {"NUM_POINTS": "10", "FOREGROUND_FRACTION": "0.3", "WEIGHT": "2.5"}
    words = [word for key, value in settings.items() for word in (f"S4M.DISTILL.{key}", value)]
    backend = RandomSam(6, pads=False)
    loss_fn = build_distillation(load_config("", words), backend)
    assert isinstance(loss_fn, StructuralDistillation) and loss_fn.backend is backend
    assert (loss_fn.num_points, loss_fn.num_foreground, loss_fn.weight) == (10, 3, 2.5)


def test_foreground_points_are_uniform_over_the_union_of_the_masks():
    size = (5, 8)
    masks = torch.zeros(2, 7, 9, dtype=torch.bool)  # padded frame
    masks[0, 1:4, 2:5] = True
    masks[1, 3, 3:8] = True
    masks[1, 6, 8] = True  # padding: never drawn
    inside = torch.nonzero(masks[:, :5, :8].any(0).flatten()).flatten()
    generator = seeded(1)
    draws = [sample_query_points(masks, size, 1, 1, generator) for _ in range(1500)]
    points = torch.cat(draws) * torch.tensor([8, 5])
    pixels = points.floor().long()
    counts = (pixels[:, 1] * 8 + pixels[:, 0]).bincount(minlength=40)
    assert counts.sum() == counts[inside].sum()
    assert chisquare(counts[inside].numpy()).pvalue > 0.01
    assert kstest((points - pixels).flatten().numpy(), "uniform").pvalue > 0.01


def test_foreground_pixels_are_distinct_and_random_points_fill_up():
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 4:6, 10:12] = True
    points = sample_query_points(masks, (20, 30), 500, 400, seeded())
    pixels = (points * torch.tensor([30, 20])).floor().long()
    foreground = sorted(map(tuple, pixels[:4].tolist()))
    assert foreground == [(10, 4), (10, 5), (11, 4), (11, 5)]
    assert len(set(map(tuple, pixels[4:400].tolist()))) < 396, "not pixels without replacement"
    assert kstest(points[4:].flatten().numpy(), "uniform").pvalue > 0.01
    assert ((points >= 0) & (points <= 1)).all()
