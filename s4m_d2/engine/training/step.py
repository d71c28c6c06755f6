"""One step of each stage: losses, gradients, and the update if all are finite."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from s4m_d2.engine.training.hooks import BadSteps
from s4m_d2.transfers import to_host

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
#: At this loss scale and below, overflow of gradients is not caused by the scale.
NEUTRAL_SCALE = 1.0

logger = logging.getLogger(__name__)


class TeacherStep(SimpleTrainer):
    """The step of stage 1, in place of Detectron2's in its ``DefaultTrainer``.

    A step with losses or gradients that are not finite is skipped (:class:`BadSteps`). If gradients
    overflow because of the loss scale, PyTorch's scaler skips the update and lowers the scale.

    Args:
        model, data_loader, optimizer: as of ``SimpleTrainer``.
        bad_steps: counts skipped steps, and ends a run with too many in a row.
        precision: of autocast; None: float32. float16 needs a scaled loss, which synchronizes.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        bad_steps: BadSteps,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.bad_steps, self.precision = bad_steps, precision
        self.device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=precision == torch.float16
        )
        self._batches: Iterator[Any] | None = None

    def run_step(self) -> None:
        labeled = self.next_batch()
        with self.autocast():
            losses = self.model(labeled)
        self.finish(losses)

    def next_batch(self) -> Any:
        """Get the next batch, and save what a skipped step needs."""
        start = time.perf_counter()
        self._batches = self._batches or iter(self.data_loader)
        self._batch = next(self._batches)
        self._data_time = time.perf_counter() - start
        self._buffers = [buffer.clone() for buffer in self.model.buffers()]
        return self._batch

    def reset_data_loader(self, data_loader_builder: Callable[[], Iterable]) -> None:
        self._batches = None
        super().reset_data_loader(data_loader_builder)

    def autocast(self) -> torch.autocast:
        """Context of mixed precision, if it is enabled."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not None)

    def finish(
        self, losses: Mapping[str, Tensor], scalars: Mapping[str, float | Tensor] | None = None
    ) -> None:
        """Compute the gradients of the losses' sum, log, and update the model, or skip the step.

        ``scalars``, more to log, are numbers or tensors of one element.
        """
        self.optimizer.zero_grad()
        total: Any = sum(losses.values())
        self.grad_scaler.scale(total).backward()
        # 1 without scaling; get_scale() would synchronize.
        scale = self.grad_scaler.scale(torch.ones((), device=self.device))
        values = losses, gradient_norms(self.optimizer), scalars or {}, scale
        finite, on_host, logged = fetch_step(*values)
        get_event_storage().put_scalars(**logged)
        if finite:
            self.write_metrics(on_host, self._data_time, self.iter)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            self.bad_steps.in_a_row = 0
            return
        for buffer, kept in zip(self.model.buffers(), self._buffers, strict=True):
            buffer.copy_(kept)  # the forward pass has updated batch norms
        self.bad_steps.skipped(self, losses, self._batch)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        elif self.grad_scaler.is_enabled():
            logger.warning("The checkpoint has no loss scale (float32, bfloat16): it starts anew.")


class StudentStep(TeacherStep):
    """The step of stage 2 (S⁴M, figure 2): the student learns from labels and pseudo-labels.

    Teacher and SAM are not part of the model. The teacher is updated before the step
    (EMATeacherHook).

    Args:
        labeling: unlabeled batch -> views (:class:`~s4m_d2.engine.PseudoLabeling`).
        unsup_loss_weight: of the losses on pseudo-labels, which are named ``unsup/...``.
        others: see :class:`TeacherStep`; the loader gives (labeled, unlabeled) batches.
    """

    def __init__(self, *others: Any, labeling: Callable, unsup_loss_weight: float) -> None:
        super().__init__(*others)
        self.labeling, self.unsup_loss_weight = labeling, unsup_loss_weight

    def run_step(self) -> None:
        labeled, unlabeled = self.next_batch()
        with self.autocast():
            views = self.labeling(unlabeled)  # teacher → selection → SAM → ARP → strong view
            losses = self.model(labeled) | self.weighted(self.model(views.student_batch))
        self.finish(losses, views.stats)  # gradients; then the update, if all is finite

    def weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and weight losses on pseudo-labels."""
        return {f"unsup/{name}": self.unsup_loss_weight * loss for name, loss in losses.items()}


def fetch_step(
    losses: Mapping[str, Tensor],
    gradient_norms: Sequence[Tensor],
    scalars: Mapping[str, float | Tensor],
    loss_scale: Tensor,
) -> tuple[bool, dict[str, Tensor], dict[str, float]]:
    """Copy a step's values to the host. Synchronizes once. All processes call this together.

    Args:
        losses: tensors of one element on one device; at least one.
        gradient_norms: 0-dim floats on that device; at least one.
        scalars: more to log; numbers, or tensors of one element.
        loss_scale: 0-dim. Above NEUTRAL_SCALE gradients may overflow.

    Returns whether all losses and gradients of all processes are finite; losses, 0-dim float64 on
    the CPU, and scalars, of this process.
    """
    values = _stack(losses.values())
    overflow = ~_stack(gradient_norms).isfinite().all() & (loss_scale <= NEUTRAL_SCALE)
    bad = (~values.isfinite().all() | overflow).float()
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    tensors = {
        name: v for name, v in scalars.items() if isinstance(v, Tensor) and v.device == bad.device
    }
    is_bad, found = to_host(bad, _stack([*values, *tensors.values()]))
    on_host = dict(zip(losses, torch.tensor(found[: len(losses)]).unbind(), strict=True))
    scalars = {**scalars, **dict(zip(tensors, found[len(losses) :], strict=True))}
    return not is_bad, on_host, {name: float(value) for name, value in scalars.items()}


def gradient_norms(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Norm of each gradient, float32: not finite if a value is not, or if the norm overflows."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    gradients = [gradient for gradient in gradients if gradient is not None and gradient.numel()]
    return [norm.float() for norm in torch._foreach_norm(gradients)] if gradients else []


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors of one element -> (N,) float64."""
    return torch.stack([tensor.detach().reshape(()) for tensor in tensors]).double()
