"""Hooks of the teacher–student training, for any Detectron2 trainer."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from s4m_d2.engine.rng import derive_seed, seed_default_generators
from s4m_d2.errors import DivergenceError, first_names
from s4m_d2.report import write_results
from s4m_d2.semi.burn_in import TeacherPhase, teacher_phase
from s4m_d2.semi.ema_teacher import EMATeacher

logger = logging.getLogger(__name__)

COUNT = "pseudo_labels/per_image"
STREAMS = ("labeled", "unlabeled")
MAX_RECORDS = 100  # the latest files of skipped steps, which are kept
MAX_NAMES = 8  # file names or parameters in a message; records list all


class BadSteps(HookBase):
    """Records steps whose losses or gradients are not finite; too many in a row end the run.

    A skipped step does not change weights, buffers, the optimizer's state, the loss scale and the
    EMA teacher; iteration, learning rate and data advance.

    Args:
        max_in_a_row: allowed number of skipped steps in a row.
        folder: for a file per skipped step, with the values of every process.
        seed: of the run, for these files.
    """

    def __init__(self, max_in_a_row: int, folder: str, seed: int) -> None:
        self.max_in_a_row, self.folder, self.seed = max_in_a_row, folder, seed
        self.in_a_row = 0  #: skipped steps up to the current one
        self.total = 0  #: skipped steps of the run

    def skipped(self, step: SimpleTrainer, losses: Mapping[str, Tensor], batch: Any) -> None:
        """Record a skipped step with these losses and gradients. All processes call this together.

        Of stage 2, ``batch`` is a pair. DivergenceError: too many steps in a row were skipped.
        """
        self.in_a_row += 1
        self.total += 1
        values = {name: loss.item() for name, loss in losses.items()}
        streams = zip(STREAMS, batch if isinstance(batch, tuple) else (batch,), strict=False)
        gradients = {name: parameter.grad for name, parameter in step.model.named_parameters()}
        found = {
            "rank": comm.get_rank(),
            "files": {
                stream: [str(sample.get("file_name", "unnamed")) for sample in samples]
                for stream, samples in streams
            },
            "losses": {name: v if math.isfinite(v) else str(v) for name, v in values.items()},
            "learning_rate": max(group["lr"] for group in step.optimizer.param_groups),
            "gradients": [
                name
                for name, gradient in gradients.items()
                if gradient is not None and not gradient.norm().isfinite()
            ],
        }
        self._report(step.iter, comm.all_gather(found))

    def _report(self, iteration: int, processes: list[dict]) -> None:
        streams = [stream for process in processes for stream in process["files"].items()]
        names = [f"{name} ({stream})" for stream, of_stream in streams for name in of_stream]
        reason, files = _reason(processes), first_names(names, MAX_NAMES)
        if comm.is_main_process():
            logger.warning(
                "Skipped iteration %d: %s (%d in a row, %d in all). Images: %s.",
                iteration, reason, self.in_a_row, self.total, files,
            )  # fmt: skip
            record = {"iteration": iteration, "seed": self.seed, "reason": reason}
            record |= {"in_a_row": self.in_a_row, "processes": processes}
            write_results(record, os.path.join(self.folder, f"iter_{iteration:07d}.json"))
            for name in sorted(os.listdir(self.folder))[:-MAX_RECORDS]:
                os.unlink(os.path.join(self.folder, name))
        if self.in_a_row > self.max_in_a_row:
            raise DivergenceError(
                f"Training stops at iteration {iteration}: {self.in_a_row} steps in a row were "
                f"skipped, more than S4M.MAX_BAD_STEPS, {self.max_in_a_row}. In the last one, "
                f"{reason}; images: {files}. The weights are those before these steps. Lower "
                "SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS; try SOLVER.AMP.ENABLED False; "
                f"check the images and annotations listed in '{self.folder}'."
            )

    def after_step(self) -> None:
        get_event_storage().put_scalar("train/bad_steps", self.total, smoothing_hint=False)

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.in_a_row, self.total = state_dict["in_a_row"], state_dict["total"]


def _reason(processes: Iterable[Mapping[str, Any]]) -> str:
    for process in processes:
        for name, value in process["losses"].items():
            if isinstance(value, str):
                return f"the loss '{name}' is {value}"
    gradients = dict.fromkeys(name for process in processes for name in process["gradients"])
    return f"gradients are not finite ({first_names(list(gradients), MAX_NAMES)})"


class EMATeacherHook(HookBase):
    """Burn-in and EMA of the teacher (Guided Distillation, section 3.2).

    Before iteration i, and thus before the teacher labels its batch: no update while
    i < ``burn_in``; at i == ``burn_in`` the teacher becomes a copy of the student; then each
    iteration is an EMA step, except after a skipped step.

    Args:
        student: the trained model, without a DDP wrapper.
        burn_in: iterations during which the stage-1 teacher is frozen.
        bad_steps: the skipped steps; None: none are skipped.
    """

    def __init__(
        self,
        teacher: EMATeacher,
        student: nn.Module,
        burn_in: int,
        bad_steps: BadSteps | None = None,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.burn_in, self.bad_steps = burn_in, bad_steps
        self.restored = False  # whether the teacher's weights come from a checkpoint

    @property
    def phase(self) -> TeacherPhase:
        """Phase in the trainer's current iteration; after training, in the last one."""
        last = self.trainer.max_iter - 1
        return teacher_phase(min(self.trainer.iter, last), self.burn_in)

    def before_step(self) -> None:
        phase = self.phase
        if phase is TeacherPhase.COPY:
            logger.info("Burn-in ends: the teacher becomes a copy of the student.")
        skipped = self.bad_steps is not None and self.bad_steps.in_a_row > 0
        if not (skipped and phase is TeacherPhase.EMA):
            self.teacher.step(self.student, phase)
        get_event_storage().put_scalar("teacher/phase", phase.value, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.model.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.teacher.model.load_state_dict(state_dict["teacher"])
        self.restored = True


class PseudoLabelCountHook(HookBase):
    """Warns if the teacher gives unusually few or many pseudo-labels.

    The main process warns when the mean of the last SMOOTHING logged ``pseudo_labels/per_image``
    has been outside the band for ``iterations`` in a row, and again only after it has returned.

    Args:
        band: smallest and largest usual number of pseudo-labels per image.
        iterations: number of iterations outside before a warning; 0: no warning.
    """

    SMOOTHING = 20  # no more than a resumed run logs again (UnwrittenMetricsHook)

    def __init__(self, band: Sequence[float], iterations: int) -> None:
        (self.low, self.high), self.iterations = band, iterations
        self.outside = 0  # iterations in a row

    def after_step(self) -> None:
        storage = get_event_storage()
        if storage.latest().get(COUNT, (0.0, None))[1] != self.trainer.iter:
            return  # nothing was labeled
        average = storage.history(COUNT).avg(self.SMOOTHING)
        self.outside = 0 if self.low <= average <= self.high else self.outside + 1
        if 0 < self.outside == self.iterations and comm.is_main_process():
            few = average < self.low
            than = f"less than {self.low:g}" if few else f"more than {self.high:g}"
            logger.warning(
                "The teacher gives %.2f pseudo-labels per image, and for %d iterations it has been "
                "%s (S4M.PSEUDO_LABEL.COUNT_BAND). If its results have fallen since stage 1, raise "
                "S4M.BURN_IN or S4M.EMA_DECAY or lower SOLVER.BASE_LR; if not, %s "
                "S4M.PSEUDO_LABEL.SCORE_THRESH.",
                average, self.iterations, than, "lower" if few else "raise",
            )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        return {"outside": self.outside}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.outside = state_dict["outside"]


class SeedHook(HookBase):
    """Seeds the default generators in each iteration, on every process, for exact resuming.

    Other libraries' layers (dropout) and users' components draw from them.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.seed, self.rank = seed, rank

    def before_step(self) -> None:
        seed_default_generators(derive_seed(self.seed, "iteration", self.trainer.iter, self.rank))


class BufferSyncHook(HookBase):
    """Broadcasts the first process' buffers to all processes after each step.

    Detectron2's trainers disable this in DDP. With the running averages of a plain BatchNorm, which
    depend on the images of one process, the EMA teachers would differ between processes. Register
    it before hooks that save, average or evaluate the model (without DDP wrapper).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def after_step(self) -> None:
        buffers = list(self.model.buffers())
        if comm.get_world_size() == 1 or not buffers:
            return
        parts = [buffer.contiguous().reshape(-1).view(torch.uint8) for buffer in buffers]
        content = torch.cat(parts)
        dist.broadcast(content, src=0)
        for buffer, part in zip(buffers, content.split([len(p) for p in parts]), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))  # clone: alignment


class FinishedEvalHook(EvalHook):
    """Detectron2's hook, without its evaluation after a failure in the last iteration: the failed
    process would wait there for the others, which wait for its gradients."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
