"""Optimizers and learning-rate schedules."""

from .build import build_lr_scheduler, build_optimizer
from .lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler

# fmt: off
__all__ = [
    "LRMultiplier", "LRScheduler", "WarmupParamScheduler", "build_lr_scheduler", "build_optimizer",
]
