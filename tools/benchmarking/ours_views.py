"""The benchmark's calls into the strong view, and what that draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarking.bench import Bench
from benchmarking.plain import StrongDraws
from s4m_d2.structures import sample_generators

BLUR_REACH = 3.0  # half width of the strong view's kernel, in sigmas


@torch.no_grad()
def strong_views(bench: Bench, images: Sequence[Tensor]) -> list[Tensor]:
    """The student's images."""
    generators = sample_generators(bench.unlabeled, "strong_view", "cpu")
    return bench.labeling.strong_view(images, generators)


def strong_view_draws(bench: Bench) -> list[StrongDraws]:
    """What the strong view draws for each image, in its order."""
    settings = bench.cfg.S4M.STRONG_VIEW
    if bench.labeling.strong_view is unchanged:
        return [StrongDraws((), False, None)] * len(bench.unlabeled)
    names = ("brightness", "contrast", "saturation", "hue")
    *factors, hue = settings.JITTER
    ranges = [(max(0.0, 1 - s), 1 + s) for s in factors] + [(-hue, hue)]
    drawn = []
    for generator in sample_generators(bench.unlabeled, "strong_view", "cpu"):
        order = torch.randperm(4, generator=generator).tolist()
        jitter, gray, blur, sigma, *shares = torch.rand(8, generator=generator).tolist()
        amounts = [low + (high - low) * s for (low, high), s in zip(ranges, shares, strict=True)]
        low, high = settings.BLUR_SIGMA
        drawn.append(
            StrongDraws(
                tuple((names[i], amounts[i]) for i in order)
                if jitter < settings.JITTER_PROB
                else (),
                gray < settings.GRAYSCALE_PROB,
                low + (high - low) * sigma if blur < settings.BLUR_PROB else None,
            )
        )
    return drawn


def unchanged(images: Sequence[Tensor], generators: object) -> list[Tensor]:
    """A strong view that changes nothing."""
    return list(images)
