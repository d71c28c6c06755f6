"""The strong view: color augmentation of the student's unlabeled images, on their device."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Generator, Tensor

from s4m_d2.transfers import to_device

_LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision weights them
_MAX = 255.0
_TO_LEVELS = 255.999 / _MAX  # as torchvision turns [0, 1] into levels
_SEXTANTS = 6
_TURN_OF_CHANNEL = (5, 3, 1)  # sextants by which red, green and blue are apart in HSV


class StrongView:
    """Color augmentation of the student's unlabeled images; the geometry does not change.

    The operations are torchvision's (``adjust_brightness`` and so on). Two round differently, by at
    most one level: contrast's mean gray level is summed as integers, so that it does not depend on
    the device, and hue is rotated without a full conversion to HSV. The blur is separable.

    Args:
        jitter: strengths of brightness, contrast, saturation (factors in 1 ± strength, at least
            0) and hue (shift in ± strength of a turn, at most 0.5).
        jitter_prob, grayscale_prob, blur_prob: probability of each step.
        blur_sigma: range of the Gaussian's standard deviation, px.
        input_format: "RGB" or "BGR", the channel order of the images.
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
        input_format: str = "RGB",
    ) -> None:
        *factors, hue = jitter
        self._ranges = [(max(0.0, 1 - s), 1 + s) for s in factors] + [(-hue, hue)]
        self._jitter_prob = jitter_prob
        self._grayscale_prob = grayscale_prob
        self._blur_sigma = blur_sigma
        self._blur_prob = blur_prob
        self._is_bgr = input_format == "BGR"

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        settings = {key.lower(): value for key, value in cfg.S4M.STRONG_VIEW.items()}
        return {**settings, "input_format": cfg.INPUT.FORMAT}

    def __call__(self, image: Tensor, generator: Generator | None = None) -> Tensor:
        """Augment one image, (3, H, W) uint8, on any device, to a new one.

        ``generator`` may be on any device; on a GPU it synchronizes. Default: PyTorch's of the CPU.
        The number of draws is always the same.
        """
        device = "cpu" if generator is None else generator.device
        image = image.flip(0) if self._is_bgr else image
        order = torch.randperm(len(self._ranges), generator=generator, device=device).tolist()
        draws = torch.rand(len(self._ranges) + 4, generator=generator, device=device).tolist()
        use_jitter, use_grayscale, use_blur, sigma, *strengths = draws
        if use_jitter < self._jitter_prob:
            for index in order:
                low, high = self._ranges[index]
                image = _OPERATIONS[index](image, low + (high - low) * strengths[index])
        if use_grayscale < self._grayscale_prob:
            image = _gray(image).expand_as(image)
        if use_blur < self._blur_prob:
            low, high = self._blur_sigma
            image = _blur(image, low + (high - low) * sigma)
        return image.flip(0) if self._is_bgr else image.clone()

    def batch(
        self, images: Sequence[Tensor], generators: Sequence[Generator] | None
    ) -> list[Tensor]:
        """Augment images, each with its own generator, if there are any."""
        return list(map(self, images, generators or itertools.repeat(None)))


def _to_levels(values: Tensor) -> Tensor:
    return values.clamp_(0.0, _MAX).to(torch.uint8)


def _gray(image: Tensor) -> Tensor:
    """(1, H, W) uint8."""
    red, green, blue = image.split(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).to(torch.uint8)


def _brightness(image: Tensor, factor: float) -> Tensor:
    return _to_levels(image * factor)


def _contrast(image: Tensor, factor: float) -> Tensor:
    gray = _gray(image)
    mean = (gray.sum().double() / gray.numel()).float()
    return _to_levels((image * factor).add_(mean * (1.0 - factor)))


def _saturation(image: Tensor, factor: float) -> Tensor:
    return _to_levels((image * factor).add_(_gray(image) * (1.0 - factor)))


def _hue(image: Tensor, turn: float) -> Tensor:
    """Rotate the hue; each channel is ``high - (high - low) * distance`` for its sextant."""
    red, green, blue = image.float().unbind()
    high = torch.maximum(torch.maximum(red, green), blue)
    spread = high - torch.minimum(torch.minimum(red, green), blue)
    sextant = torch.where(
        high == red,
        green - blue,
        torch.where(
            high == green, (blue - red).add_(spread, alpha=2), (red - green).add_(spread, alpha=4)
        ),
    )
    sextant = sextant.div_(spread.clamp(min=1.0)).add_(_SEXTANTS * torch.tensor(turn))
    result = torch.empty_like(image)
    for channel, turned in enumerate(_TURN_OF_CHANNEL):
        distance = (sextant + turned).remainder_(_SEXTANTS)
        distance = torch.minimum(distance, 4 - distance).clamp_(0.0, 1.0)
        result[channel] = (high - distance.mul_(spread)).mul_(_TO_LEVELS)
    return result


_OPERATIONS = (_brightness, _contrast, _saturation, _hue)


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Correlate along y, then along x, with a Gaussian; edges are reflected."""
    values = image.float()
    for dim in (1, 2):
        side = image.shape[dim]
        reach = min(math.ceil(3 * sigma), side - 1)
        weights = torch.exp(-0.5 * (torch.arange(reach + 1) / sigma) ** 2)
        half = to_device(weights / (2 * weights.sum() - weights[0]), image.device)
        padding = (reach, reach, 0, 0) if dim == 2 else (0, 0, reach, reach)
        padded = F.pad(values, padding, mode="reflect")
        values = padded.narrow(dim, reach, side) * half[0]
        for step in range(1, reach + 1):
            pair = padded.narrow(dim, reach - step, side) + padded.narrow(dim, reach + step, side)
            values.addcmul_(pair, half[step])
    return _to_levels(values.round_())
