"""Seeded generators."""

import torch


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def generators(count: int, seed: int = 0, device: str = "cpu") -> list[torch.Generator]:
    return [seeded(seed + i, device) for i in range(count)]
