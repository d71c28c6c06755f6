"""Whether two forms of a part give the same; asked before either is timed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from s4m_d2.errors import S4MError

OTHER_PIXELS = 1e-3  # share of a mask's frame that rounding of coordinates may change
LEVELS = 3.0  # mean difference of two strong views, of 255; PIL rounds to 8 bits after each change
SIGMAS = 5.0  # of a frequency


class Mismatch(S4MError, AssertionError):
    """The plain form of a part does not give what ours gives: nothing is compared."""


def require(equal: bool, what: str) -> None:
    """Raises: Mismatch: not ``equal``."""
    if not equal:
        raise Mismatch(
            f"{what}: the plain form and ours differ, so that their times cannot be compared. "
            "This is a bug of tools/benchmarking or of the step."
        )


def close(ours, plain, what: str, *, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    """Two tensors, or two (nested) lists of them."""
    if not isinstance(ours, Tensor):
        require(len(ours) == len(plain), what)
        for index, (one, other) in enumerate(zip(ours, plain, strict=True)):
            close(one, other, f"{what} {index}", rtol=rtol, atol=atol)
        return
    same = ours.shape == plain.shape and torch.allclose(
        ours.float(), plain.float(), rtol=rtol, atol=atol
    )
    require(same, what)


def same_labels(ours: Sequence, plain: Sequence, what: str) -> None:
    """Pseudo-labels: classes, scores, and masks but for single pixels."""
    close([one.labels for one in ours], [one.labels for one in plain], f"{what}: classes")
    close([one.scores for one in ours], [one.scores for one in plain], f"{what}: scores")
    for one, other in zip(ours, plain, strict=True):
        require(one.masks.shape == other.masks.shape, f"{what}: masks")
        if len(one):
            share = (one.masks ^ other.masks).float().mean().item()
            require(share <= OTHER_PIXELS, f"{what}: masks")


def same_pictures(ours: Sequence[Tensor], plain: Sequence[Tensor], levels: float, what: str):
    """uint8 images, by the mean difference."""
    require(len(ours) == len(plain), what)
    for one, other in zip(ours, plain, strict=True):
        require(one.shape == other.shape, what)
        require((one.float() - other.float()).abs().mean().item() <= levels, what)


def same_frequencies(ours: Tensor, plain: Tensor, what: str) -> None:
    """Two sets of clicks, (N, P, 2), drawn in N copies of one mask: how often each place occurs."""
    places = torch.cat([ours, plain]).flatten(0, 1).cpu().numpy().round(5)
    _, place = np.unique(places, axis=0, return_inverse=True)
    first, second = np.split(place.reshape(-1), [ours.shape[0] * ours.shape[1]])
    counts = [np.bincount(part, minlength=place.max() + 1) for part in (first, second)]
    shares = [count / len(drawn) for count, drawn in zip(counts, (ours, plain), strict=True)]
    mean = np.clip((shares[0] + shares[1]) / 2, 0, 1)
    spread = np.sqrt(mean * (1 - mean) * (1 / len(ours) + 1 / len(plain))) + 1e-3
    require(bool((np.abs(shares[0] - shares[1]) <= SIGMAS * spread).all()), what)


def same_state(ours: dict[str, Tensor], plain: dict[str, Tensor], what: str) -> None:
    """The tensors of two models."""
    require(ours.keys() == plain.keys(), what)
    for name, tensor in ours.items():
        close(tensor, plain[name], f"{what} {name}", rtol=1e-5, atol=1e-6)
