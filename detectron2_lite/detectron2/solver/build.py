"""Optimizers and schedules from a config."""

import copy

from detectron2.config import CfgNode
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn
from torch.optim import SGD, Optimizer

from .lr_scheduler import LRMultiplier, LRScheduler, WarmupParamScheduler

# fmt: off
_NORM_LAYERS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm,
)
# fmt: on


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build SGD as `cfg.SOLVER` says; normalization layers have a weight decay of their own."""
    solver = cfg.SOLVER
    norms = [module for module in model.modules() if isinstance(module, _NORM_LAYERS)]
    in_norms = {param for norm in norms for param in norm.parameters(recurse=False)}
    groups: dict[bool, list] = {}  # in the order in which the model has them
    for param in model.parameters():
        if param.requires_grad:
            groups.setdefault(param in in_norms, []).append(param)
    options = {True: {"weight_decay": solver.WEIGHT_DECAY_NORM}, False: {}}
    optimizer = SGD(
        [{"params": params, **options[is_norm]} for is_norm, params in groups.items()],
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
        foreach=True,
    )
    return maybe_add_gradient_clipping(cfg, optimizer)


def maybe_add_gradient_clipping(
    cfg: CfgNode, optimizer: Optimizer | type[Optimizer]
) -> Optimizer | type[Optimizer]:
    """Let an optimizer, or a class of them, clip each parameter's gradient before a step.

    Follows `cfg.SOLVER.CLIP_GRADIENTS`: CLIP_TYPE "value" or "norm", anything else raises
    ValueError. Returns the argument itself if clipping is off; an object is changed in place.
    """
    clipping = copy.deepcopy(cfg.SOLVER.CLIP_GRADIENTS)
    if not clipping.ENABLED:
        return optimizer
    if clipping.CLIP_TYPE not in ("value", "norm"):
        raise ValueError(f"unknown SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clipping.CLIP_TYPE!r}")
    base = optimizer if isinstance(optimizer, type) else type(optimizer)

    def step(self, closure=None):
        for param in (param for group in self.param_groups for param in group["params"]):
            if clipping.CLIP_TYPE == "norm":
                nn.utils.clip_grad_norm_(param, clipping.CLIP_VALUE, clipping.NORM_TYPE)
            else:
                nn.utils.clip_grad_value_(param, clipping.CLIP_VALUE)
        return base.step(self, closure)

    clipped = type(base.__name__ + "WithGradientClip", (base,), {"step": step})
    if optimizer is base:
        return clipped
    optimizer.__class__ = clipped
    return optimizer


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the schedule "WarmupMultiStepLR" of `cfg.SOLVER`; others raise ValueError.

    STEPS beyond MAX_ITER are left out; a warm-up takes at most the whole training.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        raise ValueError(f"Unknown LR scheduler: {solver.LR_SCHEDULER_NAME}")
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    factors = [solver.GAMMA**k for k in range(len(steps) + 1)]
    multiplier = WarmupParamScheduler(
        MultiStepParamScheduler(factors, num_updates=solver.MAX_ITER, milestones=steps),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier, solver.MAX_ITER)
