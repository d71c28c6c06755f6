"""The strong view: color augmentation of the student's unlabeled images, on their device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Generator, Tensor

from s4m_d2.errors import InputError
from s4m_d2.transfers import to_device

_BLUR_REACH = 3  # standard deviations that the blur's kernel covers on each side
_LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision weights them
_MAX = 255.0
_TO_LEVELS = 255.999 / _MAX  # as torchvision turns [0, 1] into levels
_SEXTANTS = 6
_TURN_OF_CHANNEL = (5, 3, 1)  # sextants by which red, green and blue are apart in HSV


@dataclass(frozen=True)
class _Steps:
    """What is done to one image; the steps that are left out are None."""

    jitter: list[tuple[int, float]] | None  # (number of the operation, amount), in their order
    grayscale: bool
    sigma: float | None


class StrongView:
    """Color augmentation of the student's unlabeled images; the geometry stays.

    The operations are torchvision's (``adjust_brightness`` and so on), written for batches with
    amounts of their own. Two differ in how they round, which may move a pixel by one level: the
    mean gray level that contrast turns around is summed as integers, so that it depends on neither
    the batch nor the device, and hue takes a shorter way through HSV. The blur is separable.

    Args:
        jitter: strengths of brightness, contrast, saturation (factors in 1 ± strength, at least
            0) and hue (shift in ± strength of a turn, at most 0.5).
        jitter_prob, grayscale_prob, blur_prob: probability of each step.
        blur_sigma: range of the Gaussian's standard deviation, px.
    """

    @configurable
    def __init__(
        self,
        *,
        jitter: Sequence[float],
        jitter_prob: float,
        grayscale_prob: float,
        blur_sigma: Sequence[float],
        blur_prob: float,
    ) -> None:
        *factors, hue = jitter
        self._ranges = [(max(0.0, 1 - s), 1 + s) for s in factors] + [(-hue, hue)]
        self._jitter_prob = jitter_prob
        self._grayscale_prob = grayscale_prob
        self._blur_sigma = tuple(blur_sigma)
        self._blur_prob = blur_prob

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        view = cfg.S4M.STRONG_VIEW
        return {
            "jitter": view.JITTER,
            "jitter_prob": view.JITTER_PROB,
            "grayscale_prob": view.GRAYSCALE_PROB,
            "blur_sigma": view.BLUR_SIGMA,
            "blur_prob": view.BLUR_PROB,
        }

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """Augment one image.

        Args:
            image: (3, H, W) uint8, RGB, on any device.
            generator: on any device; None draws fresh ones. The number of draws is always the
                same. One on a GPU is waited for.

        Returns:
            A new (3, H, W) uint8 tensor.
        """
        return self.batch([image], None if generator is None else [generator])[0]

    def batch(
        self, images: Sequence[Tensor], generators: Sequence[Generator] | None = None
    ) -> list[Tensor]:
        """Augment images of one device; what becomes of one depends on its own generator only."""
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
                raise InputError(
                    f"image must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}."
                )
        given: Sequence[Generator | None] = generators or [None] * len(images)
        steps = [self._draw(generator) for generator in given]
        views: list[Tensor] = [torch.empty(0)] * len(images)
        for group in _together(images):
            batch = torch.stack([images[i] for i in group])
            _augment(batch, [steps[i] for i in group])
            for i, view in zip(group, batch, strict=True):
                views[i] = view
        return views

    def _draw(self, generator: Generator | None) -> _Steps:
        if generator is None:
            generator = Generator()
            generator.seed()
        device = generator.device
        order = torch.randperm(len(self._ranges), generator=generator, device=device).tolist()
        draws = torch.rand(len(self._ranges) + 4, generator=generator, device=device).tolist()
        use_jitter, use_grayscale, use_blur, sigma, *strengths = draws
        amounts = [(index, _between(self._ranges[index], strengths[index])) for index in order]
        return _Steps(
            jitter=amounts if use_jitter < self._jitter_prob else None,
            grayscale=use_grayscale < self._grayscale_prob,
            sigma=_between(self._blur_sigma, sigma) if use_blur < self._blur_prob else None,
        )


def _between(limits: Sequence[float], share: float) -> float:
    low, high = limits
    return low + (high - low) * share


def _together(images: Sequence[Tensor]) -> list[list[int]]:
    """Images of equal size; on the CPU each by itself, since one already fills the caches."""
    groups: dict[tuple, list[int]] = {}
    for i, image in enumerate(images):
        key = (tuple(image.shape), i if image.device.type == "cpu" else 0)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _augment(images: Tensor, steps: Sequence[_Steps]) -> None:
    """Change a (B, 3, H, W) batch in place, each step for all images that take it."""
    for place in range(len(_OPERATIONS)):
        for index, operation in enumerate(_OPERATIONS):
            amounts = {
                i: step.jitter[place][1]
                for i, step in enumerate(steps)
                if step.jitter is not None and step.jitter[place][0] == index
            }
            _apply(operation, images, amounts)
    _apply(_grayscale, images, {i: 1.0 for i, step in enumerate(steps) if step.grayscale})
    sigmas = {i: step.sigma for i, step in enumerate(steps) if step.sigma is not None}
    if sigmas:
        kernels = _kernels(list(sigmas.values()), images.shape[2:])
        _apply(lambda chosen, _: _blur(chosen, *kernels), images, sigmas)


def _apply(
    operation: Callable[[Tensor, Tensor], Tensor], images: Tensor, amounts: dict[int, float]
) -> None:
    """Replace those of (B, 3, H, W) ``images`` that have an amount; these go to (n, 1, 1, 1)."""
    if not amounts:
        return
    values = torch.tensor(list(amounts.values()), dtype=torch.float64)
    values = to_device(values, images.device)[:, None, None, None]
    if len(amounts) == len(images):
        images.copy_(operation(images, values))
        return
    index = to_device(list(amounts), images.device)
    images.index_copy_(0, index, operation(images[index], values))


def _to_levels(values: Tensor) -> Tensor:
    return values.clamp_(0.0, _MAX).to(torch.uint8)


def _gray(images: Tensor) -> Tensor:
    """(B, 1, H, W) uint8."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).to(torch.uint8)


def _grayscale(images: Tensor, _: Tensor) -> Tensor:
    return _gray(images).expand_as(images)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _to_levels(images * factor.float())


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(images)
    mean = gray.sum(dim=(1, 2, 3), keepdim=True).double() / gray[0].numel()
    return _to_levels((images * factor.float()).add_(((1.0 - factor).float()) * mean.float()))


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _to_levels((images * factor.float()).add_(_gray(images) * (1.0 - factor).float()))


def _hue(images: Tensor, turn: Tensor) -> Tensor:
    """The hue turned; each channel is then ``high - (high - low) * distance`` for its sextant."""
    red, green, blue = images.float().unbind(dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)
    spread = high - torch.minimum(torch.minimum(red, green), blue)
    sextant = torch.where(
        high == red,
        green - blue,
        torch.where(
            high == green, (blue - red).add_(spread, alpha=2), (red - green).add_(spread, alpha=4)
        ),
    )
    sextant = sextant.div_(spread.clamp(min=1.0)).add_(_SEXTANTS * turn[:, 0].float())
    result = torch.empty_like(images)
    for channel, turned in enumerate(_TURN_OF_CHANNEL):
        distance = (sextant + turned).remainder_(_SEXTANTS)
        distance = torch.minimum(distance, 4 - distance).clamp_(0.0, 1.0)
        result[:, channel] = (high - distance.mul_(spread)).mul_(_TO_LEVELS)
    return result


_OPERATIONS = (_brightness, _contrast, _saturation, _hue)


def _kernels(sigmas: Sequence[float], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Halves of the Gaussians along y and x, (n, reach + 1) each, from the center outwards."""
    halves = []
    for side in size:
        reaches = [min(math.ceil(_BLUR_REACH * sigma), side - 1) for sigma in sigmas]
        half = torch.zeros(len(sigmas), max(reaches) + 1)
        for row, sigma, reach in zip(half, sigmas, reaches, strict=True):
            weights = torch.exp(-0.5 * (torch.arange(reach + 1) / sigma) ** 2)
            row[: reach + 1] = weights / (2 * weights.sum() - weights[0])
        halves.append(half)
    return halves[0], halves[1]


def _blur(images: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    values = images.float()
    for dim, half in ((2, along_y), (3, along_x)):
        values = _convolve(values, to_device(half, images.device)[:, :, None, None, None], dim)
    return values.round_().clamp_(0.0, _MAX).to(torch.uint8)


def _convolve(values: Tensor, half: Tensor, dim: int) -> Tensor:
    """Correlate along ``dim`` with symmetric kernels, (n, reach + 1, 1, 1, 1); edges reflected."""
    reach, side = half.shape[1] - 1, values.shape[dim]
    padding = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
    padded = F.pad(values, padding, mode="reflect")
    result = padded.narrow(dim, reach, side) * half[:, 0]
    for step in range(1, reach + 1):
        pair = padded.narrow(dim, reach - step, side) + padded.narrow(dim, reach + step, side)
        result.addcmul_(pair, half[:, step])
    return result
