"""Masks, labels and generators of the tests of ARP."""

import torch

from s4m_d2.structures import PseudoLabels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(batch: int, seed: int = 0) -> list[torch.Generator]:
    return [seeded(seed + i) for i in range(batch)]


def rectangle(size, top, left, height, width) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def labels_of(masks, first_label=0, size=None) -> PseudoLabels:
    if not len(masks):
        return PseudoLabels.empty(size)
    index = torch.arange(len(masks))
    return PseudoLabels(first_label + index, torch.stack(list(masks)), 0.5 + index / 100)
