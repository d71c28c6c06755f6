"""What the host learns of a training step, in the one wait that the training loop has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor

from s4m_d2.transfers import to_host

#: At this loss scale and below, gradients that overflow do so on their own account.
NEUTRAL_SCALE = 1.0


@dataclass(frozen=True)
class StepValues:
    """A step as the host knows it.

    Attributes:
        finite: whether all losses and gradients of all processes are finite.
        losses: of this process; 0-dim float64 on the CPU, so that nobody has to wait for them.
        scalars: of this process.
    """

    finite: bool
    losses: dict[str, Tensor]
    scalars: dict[str, float]


def fetch_step(
    losses: Mapping[str, Tensor],
    gradient_norms: Sequence[Tensor] = (),
    scalars: Mapping[str, float | Tensor] | None = None,
    loss_scale: Tensor | None = None,
) -> StepValues:
    """Bring a step's values to the host. All processes call this together.

    Args:
        losses: of one element and one device, one or more.
        gradient_norms: 0-dim floats of that device.
        scalars: more to log; numbers, or tensors of one element.
        loss_scale: 0-dim; of this process' gradients. Above NEUTRAL_SCALE they may overflow; None:
            they are not scaled.
    """
    values = _stack(losses.values())
    bad = ~values.isfinite().all()
    if gradient_norms:
        overflow = ~_stack(gradient_norms).isfinite().all()
        bad = bad | (overflow if loss_scale is None else overflow & (loss_scale <= NEUTRAL_SCALE))
    bad = bad.float()
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    scalars = dict(scalars or {})
    waiting = {
        name: v for name, v in scalars.items() if isinstance(v, Tensor) and v.device == bad.device
    }
    stacks = [_stack(waiting.values())] if waiting else []
    is_bad, numbers, *fetched = to_host(bad, values, *stacks)
    for stacked in fetched:
        scalars.update(zip(waiting, stacked, strict=True))
    return StepValues(
        finite=not is_bad,
        losses=dict(zip(losses, torch.tensor(numbers).unbind(), strict=True)),
        scalars={name: float(value) for name, value in scalars.items()},
    )


def gradient_norms(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The norm of each gradient, float32: not finite if a value is not, or if it overflows."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    return [norm.float() for norm in torch._foreach_norm(gradients)] if gradients else []


def _stack(tensors) -> Tensor:
    """Tensors of one element -> (N,) float64."""
    return torch.stack([tensor.detach().reshape(()) for tensor in tensors]).double()
