"""Learning-rate schedules over iterations, with warm-up."""

from __future__ import annotations

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """`scheduler`, with its first part replaced by a warm-up. All times are shares of the training.

    The warm-up takes `warmup_length`. It rises ("linear") from `warmup_factor` x the first value
    to the value that `scheduler` has by then, or stays ("constant"). With `rescale_interval` all
    of `scheduler` follows, squeezed into the rest.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ):
        if warmup_method not in ("constant", "linear"):
            raise ValueError(f"Unknown warmup method: {warmup_method}")
        first = warmup_factor * scheduler(0.0)
        last = scheduler(0.0 if rescale_interval else warmup_length)
        rises = warmup_method == "linear"
        warmup = LinearParamScheduler(first, last) if rises else ConstantParamScheduler(first)
        scaling = ["rescaled", "rescaled" if rescale_interval else "fixed"]
        super().__init__([warmup, scheduler], [warmup_length, 1 - warmup_length], scaling)


class LRMultiplier(LRScheduler):
    """Base rates x `multiplier(iteration / max_iter)`. The state is the position only."""

    def __init__(
        self,
        optimizer: Optimizer,
        multiplier: ParamScheduler,
        max_iter: int,
        last_iter: int = -1,
    ):
        self._multiplier, self._max_iter = multiplier, max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def get_lr(self) -> list[float]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict:
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}
