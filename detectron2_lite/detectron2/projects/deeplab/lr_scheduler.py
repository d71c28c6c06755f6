"""The poly schedule."""

from __future__ import annotations

from detectron2.solver.lr_scheduler import LRScheduler, _get_warmup_factor_at_iter
from torch.optim import Optimizer


class WarmupPolyLR(LRScheduler):
    """Base rate x warm-up x (1 - t / max_iters) ** power.

    After the warm-up the factor does not fall below `constant_ending`, if that is positive.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
        power: float = 0.9,
        constant_ending: float = 0.0,
    ):
        self.max_iters = max_iters
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        self.power = power
        self.constant_ending = constant_ending
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        warmup = _get_warmup_factor_at_iter(
            self.warmup_method, self.last_epoch, self.warmup_iters, self.warmup_factor
        )
        poly = (1.0 - self.last_epoch / self.max_iters) ** self.power
        if warmup == 1.0 and self.constant_ending > 0:
            poly = max(poly, self.constant_ending)
        return [base_lr * warmup * poly for base_lr in self.base_lrs]
