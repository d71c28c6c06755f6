"""The strong view: its steps, its draws, and torchvision's operations one by one as a reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeds import seeded
from test_transforms import config
from torchvision.transforms import functional as F

from s4m_d2.data import StrongView

RANGES = [(0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)]
OPERATIONS = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


def strong_view(**changes):
    settings = {
        "jitter": (0.4, 0.4, 0.4, 0.1),
        "jitter_prob": 0.8,
        "grayscale_prob": 0.2,
        "blur_sigma": (0.1, 2.0),
        "blur_prob": 0.5,
    }
    return StrongView(**{**settings, **changes})


def noise(size, seed):
    return torch.randint(0, 256, (3, *size), generator=seeded(seed), dtype=torch.uint8)


@given(st.integers(0, 2**63 - 1))
def test_the_strong_view_always_draws_as_often(seed):
    never, always = seeded(seed), seeded(seed)
    for generator, p in ((never, 0.0), (always, 1.0)):
        strong_view(jitter_prob=p, grayscale_prob=p, blur_prob=p)(noise((32, 64), 0), generator)
    assert torch.equal(never.get_state(), always.get_state())


def test_the_strong_view_reads_its_config_and_without_steps_is_a_copy():
    cfg = config()
    for step in ("JITTER", "GRAYSCALE", "BLUR"):
        cfg.S4M.STRONG_VIEW[f"{step}_PROB"] = 0.0
    image = noise((32, 64), 0)
    same = StrongView(cfg)(image, seeded(0))
    assert torch.equal(same, image) and same.data_ptr() != image.data_ptr()


def between(limits, share):
    return limits[0] + (limits[1] - limits[0]) * share


def literally(image, generator):
    """The strong view by torchvision's functions, with the draws in the documented order."""
    order = torch.randperm(4, generator=generator).tolist()
    jitter, grayscale, blur, sigma, *shares = torch.rand(8, generator=generator).tolist()
    if jitter < 0.8:
        for index in order:
            image = OPERATIONS[index](image, between(RANGES[index], shares[index]))
    if grayscale < 0.2:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if blur < 0.5:
        sigma = between((0.1, 2.0), sigma)
        reach = math.ceil(3 * sigma)
        kernel = [2 * min(reach, side - 1) + 1 for side in (image.shape[2], image.shape[1])]
        image = F.gaussian_blur(image, kernel, [sigma, sigma])
    return image


@pytest.mark.parametrize("size", [(48, 64), (3, 7)])
def test_a_view_is_torchvisions_up_to_rounding(size):
    """One level of difference in one step may be two after a contrast of 1.4."""
    view, different = strong_view(), 0.0
    for seed in range(40):
        image = noise(size, seed)
        expected = literally(image, seeded(seed)).int()
        distance = (view(image, seeded(seed)).int() - expected).abs()
        assert distance.max() <= 2
        different += (distance > 0).float().mean().item() / 40
    assert different < 2e-3, "nearly all pixels are the same to the level"


def test_blue_may_come_first_and_seeds_may_be_absent():
    image = noise((48, 64), 0)
    cfg = config()
    cfg.INPUT.FORMAT = "BGR"
    swapped = StrongView(cfg)(image.flip(0), seeded(4)).flip(0)
    assert torch.equal(swapped, strong_view()(image, seeded(4)))
    torch.manual_seed(4)
    (unseeded,) = strong_view().batch([image], None)  # of another loader
    assert torch.equal(unseeded, swapped)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_view_up_to_rounding():
    images = [noise((48, 64), seed) for seed in range(20)]
    view = strong_view()
    on_cpu = view.batch(images, [seeded(seed) for seed in range(20)])
    on_gpu = view.batch([i.cuda() for i in images], [seeded(seed) for seed in range(20)])
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert (a.int() - b.cpu().int()).abs().max() <= 2
