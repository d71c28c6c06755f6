"""Learning-rate schedules: fvcore's relative ones as torch schedulers, with warm-up."""

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupParamScheduler(CompositeParamScheduler):
    """Another schedule with a warm-up in place of its beginning.

    warmup_factor: the first value, relative to the schedule's first value.
    warmup_length: in [0, 1], relative to the whole training.
    warmup_method: "linear" (up to the schedule's value where warm-up ends) or "constant".
    rescale_interval: start the schedule after the warm-up instead of underneath it.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ):
        start = warmup_factor * scheduler(0.0)
        if warmup_method == "constant":
            warmup = ConstantParamScheduler(start)
        elif warmup_method == "linear":
            end = scheduler(0.0 if rescale_interval else warmup_length)
            warmup = LinearParamScheduler(start, end)
        else:
            raise ValueError(f"Unknown warmup method: {warmup_method}")
        lengths = [warmup_length, 1 - warmup_length]
        super().__init__(
            [warmup, scheduler], lengths, ["rescaled", "rescaled" if rescale_interval else "fixed"]
        )


class LRMultiplier(LRScheduler):
    """Multiplies each parameter group's initial learning rate by a schedule over `max_iter`."""

    def __init__(
        self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1
    ):
        if not isinstance(multiplier, ParamScheduler):
            raise ValueError(f"multiplier must be an fvcore ParamScheduler, got {multiplier}")
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def state_dict(self) -> dict:
        """The position only: fvcore's schedules have no state."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def get_lr(self) -> list[float]:
        factor = self._multiplier(self.last_epoch / self._max_iter)
        return [base_lr * factor for base_lr in self.base_lrs]


def _get_warmup_factor_at_iter(method: str, iter: int, warmup_iters: int, factor: float) -> float:
    """Factor on the learning rate at iteration `iter`: 1 from `warmup_iters` on."""
    if iter >= warmup_iters:
        return 1.0
    if method not in ("constant", "linear"):
        raise ValueError(f"Unknown warmup method: {method}")
    progress = iter / warmup_iters if method == "linear" else 0.0
    return factor * (1 - progress) + progress
