"""Optimizers and schedules from a config."""

import copy
import logging
from collections import defaultdict
from typing import Any

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
    """Build SGD with `cfg.SOLVER`'s rates, weight decays and gradient clipping."""
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    optimizer = SGD(
        params,
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


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    overrides: dict[str, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer, one for each set of hyper-parameters.

    base_lr, weight_decay: for all parameters; None leaves them to the optimizer.
    weight_decay_norm: for the parameters of normalization layers.
    bias_lr_factor, weight_decay_bias: for parameters named "bias".
    overrides: a parameter's own name ("bias") -> hyper-parameters that replace the others.
    """
    overrides = dict(overrides or {})
    scales_bias = bias_lr_factor is not None and bias_lr_factor != 1.0
    if base_lr is None and scales_bias:
        raise ValueError("bias_lr_factor requires base_lr")
    bias = {"lr": base_lr * bias_lr_factor} if scales_bias else {}
    if weight_decay_bias is not None:
        bias["weight_decay"] = weight_decay_bias
    if bias and "bias" in overrides:
        raise ValueError("Conflicting overrides for 'bias'")
    overrides |= {"bias": bias} if bias else {}

    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if not param.requires_grad or param in seen:
                continue
            seen.add(param)
            options = {"lr": base_lr, "weight_decay": weight_decay}
            if isinstance(module, _NORM_LAYERS) and weight_decay_norm is not None:
                options["weight_decay"] = weight_decay_norm
            options |= overrides.get(name, {})
            groups[tuple((k, v) for k, v in options.items() if v is not None)].append(param)
    return [{**dict(options), "params": params} for options, params in groups.items()]


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build the schedule "WarmupMultiStepLR" of `cfg.SOLVER`; others raise ValueError."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        raise ValueError(f"Unknown LR scheduler: {solver.LR_SCHEDULER_NAME}")
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    if len(steps) != len(solver.STEPS):
        logging.getLogger(__name__).warning("SOLVER.STEPS beyond SOLVER.MAX_ITER are ignored.")
    values = [solver.GAMMA**k for k in range(len(steps) + 1)]
    schedule = WarmupParamScheduler(
        MultiStepParamScheduler(values, num_updates=solver.MAX_ITER, milestones=steps),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
        solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=schedule, max_iter=solver.MAX_ITER)
