"""Optimizers and learning-rate schedules."""

from .build import build_lr_scheduler, build_optimizer, maybe_add_gradient_clipping
from .lr_scheduler import LRScheduler, WarmupMultiStepLR

# fmt: off
__all__ = [
    "LRScheduler", "WarmupMultiStepLR", "build_lr_scheduler", "build_optimizer",
    "maybe_add_gradient_clipping",
]
