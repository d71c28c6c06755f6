"""Steps whose losses or gradients are not finite are skipped and recorded; too many end a run.

A skipped step leaves the weights, the model's buffers, the optimizer's state, the loss scale and
the EMA teacher as they were; the iteration, the learning rate and the data go on.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from s4m_d2.errors import ConfigError, DivergenceError
from s4m_d2.files import atomic_write

logger = logging.getLogger(__name__)

STREAMS = ("labeled", "unlabeled")
MAX_RECORDS = 100  # files of skipped steps that are kept, the latest
MAX_NAMES = 8  # file names or parameters in a message; a record holds all files


class BadSteps(HookBase):
    """Counts skipped steps, writes their batches down and ends a run that makes no more progress.

    The counts are part of the trainer's state and of what it logs (``train/bad_steps``). Each
    skipped step leaves a file in ``folder``, written by the main process, with what every process
    saw: iteration, seed, losses, file names.

    Args:
        max_in_a_row: skipped steps in a row that a run survives.
        folder: of the records; made with the first.
        seed: the run's.

    Attributes:
        in_a_row: skipped steps up to the current one; 0 after a step that was made.
        total: skipped steps of the run.
    """

    def __init__(self, max_in_a_row: int, folder: str, seed: int) -> None:
        if max_in_a_row < 0:
            raise ConfigError(f"S4M.MAX_BAD_STEPS is {max_in_a_row}; expected 0 or more.")
        self.max_in_a_row = max_in_a_row
        self.folder = folder
        self.seed = seed
        self.in_a_row = self.total = 0

    def made(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    def skipped(self, iteration: int, found: dict[str, Any]) -> None:
        """A step was skipped. All processes call this together.

        Args:
            iteration: of the step.
            found: what this process saw, of :func:`describe`.

        Raises:
            DivergenceError: these are more steps in a row than the run may lose.
        """
        self.in_a_row += 1
        self.total += 1
        processes = comm.gather({"rank": comm.get_rank(), **found}) or [found]
        reason = _reason(processes)
        files = _shown(
            f"{name} ({stream})"
            for process in processes
            for stream, names in process["files"].items()
            for name in names
        )
        if comm.is_main_process():
            logger.warning(
                "Skipped iteration %d: %s (%d in a row, %d in all). Images: %s.",
                iteration, reason, self.in_a_row, self.total, files,
            )  # fmt: skip
            self._record(iteration, reason, processes)
        if self.in_a_row > self.max_in_a_row:
            raise DivergenceError(
                f"Training stops at iteration {iteration}: {self.in_a_row} steps in a row were "
                f"skipped, more than S4M.MAX_BAD_STEPS, {self.max_in_a_row}. In the last one, "
                f"{reason}; images: {files}. The weights are those before these steps. Lower "
                "SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS; if SOLVER.AMP.ENABLED is True, "
                "try without; look at the images and annotations that the records in "
                f"'{self.folder}' name."
            )

    def _record(self, iteration: int, reason: str, processes: list[dict[str, Any]]) -> None:
        record = {"iteration": iteration, "seed": self.seed, "reason": reason}
        record |= {"in_a_row": self.in_a_row, "processes": processes}
        try:
            with atomic_write(os.path.join(self.folder, f"iter_{iteration:07d}.json")) as file:
                json.dump(record, file, indent=1, allow_nan=False)
            for name in sorted(os.listdir(self.folder))[:-MAX_RECORDS]:
                os.unlink(os.path.join(self.folder, name))
        except OSError as error:  # such as a full disk: no reason to end the run
            logger.warning("The skipped step could not be recorded in %s: %s", self.folder, error)

    def after_step(self) -> None:
        get_event_storage().put_scalar("train/bad_steps", self.total, smoothing_hint=False)

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.in_a_row, self.total = state_dict["in_a_row"], state_dict["total"]


def describe(
    losses: Mapping[str, Tensor],
    batch: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """What one process knows of a bad step, in JSON's types; "nan", "inf" and "-inf" are strings.

    Args:
        batch: of stage 1 (samples) or 2 (labeled and unlabeled samples).

    Returns:
        ``files``, ``losses``, ``learning_rate`` (the largest) and ``gradients``: the names of
        parameters whose gradients are not finite.
    """
    values = {name: loss.item() for name, loss in losses.items()}
    streams = batch if isinstance(batch, tuple) else (batch,)
    return {
        "files": {
            stream: [str(sample.get("file_name", "unnamed")) for sample in samples]
            for stream, samples in zip(STREAMS, streams, strict=False)
        },
        "losses": {name: v if math.isfinite(v) else str(v) for name, v in values.items()},
        "learning_rate": max(group["lr"] for group in optimizer.param_groups),
        "gradients": [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not parameter.grad.norm().isfinite()
        ],
    }


def _reason(processes: Sequence[Mapping[str, Any]]) -> str:
    """The first loss of any process that is not finite, or else the gradients that are not."""
    for process in processes:
        for name, value in process["losses"].items():
            if isinstance(value, str):
                return f"the loss '{name}' is {value}"
    gradients = dict.fromkeys(name for process in processes for name in process["gradients"])
    if gradients:
        return f"gradients are not finite ({_shown(gradients)})"
    return "another process's loss is not finite"  # on all but the main process


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
