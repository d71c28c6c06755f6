"""Structural distillation: what holds for any batch."""

import torch
from literal_distillation import CHANNELS, RandomSam
from seeds import seeded

from s4m_d2.engine.config_file import load_config
from s4m_d2.losses import StructuralDistillation, build_distillation

SIDE = 6


def make_batch(sizes, padded_size):
    """Mask features at a quarter of the padded size, images of different means, masks."""
    generator = seeded(0)
    h, w = padded_size[0] // 4, padded_size[1] // 4
    features = torch.randn(len(sizes), CHANNELS, h, w, generator=generator).requires_grad_()
    images = torch.stack([torch.full((3, *padded_size), float(i)) for i in range(len(sizes))])
    masks = [torch.rand(2, *padded_size, generator=generator) > 0.7 for _ in sizes]
    return features, images, sizes, masks


def test_gradients_reach_the_mask_features_only():
    backend = RandomSam(SIDE, pads=False)
    features, images, sizes, masks = make_batch([(24, 24)], (24, 24))
    images.requires_grad_()
    loss_fn = StructuralDistillation(backend=backend, num_points=8)
    loss_fn(features, images, sizes, masks, [seeded(0)])["loss_sd"].backward()
    assert features.grad.abs().sum() > 0
    assert torch.isfinite(features.grad).all()
    assert images.grad is None and backend.base.grad is None and backend.tilt.grad is None


def test_autocast_does_not_change_the_arithmetic():
    backend = RandomSam(SIDE, pads=False)
    features, images, sizes, masks = make_batch([(24, 24)], (24, 24))
    half = features.detach().bfloat16().requires_grad_()
    loss_fn = StructuralDistillation(backend=backend, num_points=16)
    plain = loss_fn(half.detach().float(), images, sizes, masks, [seeded(0)])["loss_sd"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss_fn(half, images, sizes, masks, [seeded(0)])["loss_sd"]
    mixed.backward()
    assert mixed.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.detach(), plain, rtol=1e-6, atol=0)


def test_chunks_of_prompts_bound_the_memory_and_change_nothing():
    sizes = [(16, 32), (32, 20)]
    batch = make_batch(sizes, (32, 32))
    whole = StructuralDistillation(backend=RandomSam(SIDE, pads=True), num_points=11)
    expected = whole(*batch, [seeded(0), seeded(1)])
    for max_prompts in (1, 5):
        chunked = RandomSam(SIDE, pads=True)
        loss_fn = StructuralDistillation(backend=chunked, num_points=11, max_prompts=max_prompts)
        torch.testing.assert_close(loss_fn(*batch, [seeded(0), seeded(1)]), expected)
        assert chunked.largest_call <= max(max_prompts, len(sizes))


def test_the_config_selects_and_parametrizes_the_loss():
    settings = {"NUM_POINTS": "10", "FOREGROUND_FRACTION": "0.3", "WEIGHT": "2.5"}
    words = [word for key, value in settings.items() for word in (f"S4M.DISTILL.{key}", value)]
    backend = RandomSam(SIDE, pads=False)
    loss_fn = build_distillation(load_config("", words), backend)
    assert isinstance(loss_fn, StructuralDistillation) and loss_fn.backend is backend
    assert (loss_fn.num_points, loss_fn.num_foreground, loss_fn.weight) == (10, 3, 2.5)
