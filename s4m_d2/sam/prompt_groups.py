"""Which prompts share a pass of SAM's decoder: found on the host, for which nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s4m_d2.errors import InputError
from s4m_d2.transfers import to_device, to_host

PADDING_LABEL = -1
VALID_LABELS = (1, 0, PADDING_LABEL)


@dataclass(frozen=True)
class PromptGroup:
    """Prompts of one length, without padding; all of them arrays, or all tensors, of int64.

    Attributes:
        rows: (n,) their places among the prompts of all images.
        images: (n,) of which image they are.
        points: (n, k) where their points lie among those of all images, row by row.
        labels: (n, k) 1 positive, 0 negative.
    """

    rows: Any
    images: Any
    points: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parts(self) -> tuple:
        return self.rows, self.images, self.points, self.labels


def labels_on_host(labels: Sequence[Tensor]) -> list[np.ndarray]:
    """The labels as arrays; the host waits once if some are not on the CPU.

    Raises:
        InputError: a label is none of 1, 0 and -1.
    """
    elsewhere = [i for i, given in enumerate(labels) if given.device.type != "cpu"]
    copies = to_host(*(labels[i] for i in elsewhere)) if elsewhere else []
    copied = dict(zip(elsewhere, copies, strict=True))
    arrays = []
    for number, given in enumerate(labels):
        array = copied[number] if number in copied else given.detach().numpy()
        if not np.isin(array, VALID_LABELS).all():
            raise InputError(
                f"image {number} has point labels {np.unique(array).tolist()}; expected 1, 0 or "
                "-1 (padding)"
            )
        arrays.append(array.astype(np.int64))
    return arrays


def group_prompts(labels: Sequence[np.ndarray], max_prompts: int) -> list[PromptGroup]:
    """Groups of at most ``max_prompts`` prompts with equally many points.

    A padding point is no neutral token in SAM: it takes part in every attention. Prompts of equal
    length share a pass, so padding never reaches the decoder.

    Args:
        labels: (N_i, P_i) of each image, with padding anywhere.
    """
    by_length: dict[int, list[tuple[np.ndarray, ...]]] = {}
    first_row = first_point = 0
    for image, given in enumerate(labels):
        valid = given != PADDING_LABEL
        order = np.argsort(~valid, axis=1, kind="stable")  # padding last
        points = first_point + np.arange(given.size, dtype=np.int64).reshape(given.shape)
        points, given = (np.take_along_axis(x, order, axis=1) for x in (points, given))
        lengths = valid.sum(axis=1)
        for length in np.unique(lengths).tolist():
            chosen = np.flatnonzero(lengths == length)
            images = np.full(len(chosen), image, dtype=np.int64)
            part = (first_row + chosen, images, points[chosen, :length], given[chosen, :length])
            by_length.setdefault(length, []).append(part)
        first_row, first_point = first_row + len(given), first_point + given.size
    groups = []
    for _, parts in sorted(by_length.items()):
        whole = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        for start in range(0, len(whole[0]), max_prompts):
            groups.append(PromptGroup(*(x[start : start + max_prompts] for x in whole)))
    return groups


def groups_on_device(groups: Sequence[PromptGroup], device: torch.device) -> list[PromptGroup]:
    """The same groups as tensors, in one copy."""
    if not groups:
        return []
    arrays = [array for group in groups for array in group.parts]
    packed = to_device(np.concatenate([array.ravel() for array in arrays]), device)
    split = iter(packed.split([array.size for array in arrays]))
    return [PromptGroup(*(next(split).view(x.shape) for x in group.parts)) for group in groups]
