"""Learning-rate schedules over iterations, with warm-up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupLR(LRScheduler):
    """Base rate x warm-up x `factor(iteration)`, which a subclass defines.

    During the first `warmup_iters` iterations the warm-up rises from `warmup_factor` to 1
    ("linear") or stays there ("constant"). The state is the position, not the schedule.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_factor: float,
        warmup_iters: int,
        warmup_method: str,
        last_epoch: int,
    ):
        if warmup_method not in ("constant", "linear"):
            raise ValueError(f"Unknown warmup method: {warmup_method}")
        self._warmup = warmup_factor, warmup_iters, warmup_method == "linear"
        super().__init__(optimizer, last_epoch)

    def factor(self, iteration: int) -> float:
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        factor, (warmup_factor, warmup_iters, rises) = self.factor(self.last_epoch), self._warmup
        if self.last_epoch < warmup_iters:
            progress = self.last_epoch / warmup_iters if rises else 0.0
            factor *= warmup_factor * (1 - progress) + progress
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}


class WarmupMultiStepLR(WarmupLR):
    """`gamma` to the power of the number of `milestones` (iterations, ascending) reached."""

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ):
        self._milestones, self._gamma = milestones, gamma
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def factor(self, iteration: int) -> float:
        return self._gamma ** bisect_right(self._milestones, iteration)
