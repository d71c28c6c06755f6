"""Hooks of the teacher–student training, for any Detectron2 trainer; exact resuming."""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import Tensor, nn

from s4m_d2.engine import rng
from s4m_d2.engine.config_file import config_items
from s4m_d2.errors import ConfigError, DivergenceError, first_names, raise_all
from s4m_d2.files import remove_lines
from s4m_d2.report import write_results
from s4m_d2.semi.ema_teacher import EMATeacher, TeacherPhase, teacher_phase

logger = logging.getLogger(__name__)

COUNT = "pseudo_labels/per_image"
STREAMS = ("labeled", "unlabeled")
MAX_RECORDS = 100  # files of skipped steps that are kept, the latest
MAX_NAMES = 8  # file names or parameters in a message; records list all

PERIOD = 20  # iterations between lines of metrics.json, and in a median of it (Detectron2)
_TIMES = ("data_time", "eta_seconds", "rank_data_time", "time")  # not restored
_SCHEDULE = "LRScheduler"  # Detectron2's hook

MAX_ITER, BURN_IN, PROCESSES = "SOLVER.MAX_ITER", "S4M.BURN_IN", "processes"
_BATCH, _UNLABELED_BATCH = "SOLVER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"
_OF_BOTH_STAGES = ("SEED", "DATASETS.TRAIN", "S4M.SPLIT_SEED", _BATCH, MAX_ITER)
_OF_STAGE_2 = ("DATASETS.UNLABELED", _UNLABELED_BATCH, BURN_IN, "S4M.EMA_DECAY")


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
                for name, p in step.model.named_parameters()
                if p.grad is not None and not p.grad.norm().isfinite()
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
    losses = [loss for process in processes for loss in process["losses"].items()]
    for name, value in losses:
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
    has been outside ``band`` (lowest, highest) for ``iterations`` in a row (0: never), and again
    only after it has returned.
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


class BufferSyncHook(HookBase):
    """Broadcasts the first process' buffers to all processes after each step, before hooks that use
    the model (without DDP wrapper).

    Detectron2 disables this in DDP. A plain BatchNorm's running averages depend on the images of
    one process, so that the EMA teachers would differ.
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


def run_settings(cfg: CfgNode, processes: int, *, has_teacher: bool) -> dict[str, Any]:
    """Settings that determine a stage's training, by config key; ``processes`` share a batch."""
    names = _OF_BOTH_STAGES + (_OF_STAGE_2 if has_teacher else ())
    values = config_items(cfg)
    settings = {name: values[name] for name in names}
    if has_teacher:
        settings[_UNLABELED_BATCH] = settings[_UNLABELED_BATCH] or settings[_BATCH]
    return {PROCESSES: processes, **settings}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Messages on changed settings (:func:`run_settings`)."""
    for name, value in now.items():
        if before.get(name, value) != value:
            yield f"{name} was {before[name]} and is {value} now: from here on, it is another run."


def continuation_errors(
    finished: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[ConfigError]:
    """Errors of settings with which a run cannot be resumed after ``finished`` iterations."""
    if now[MAX_ITER] < finished:
        yield ConfigError(
            "SOLVER.MAX_ITER (stage 1: S4M.TEACHER.MAX_ITER, last: S4M.FINETUNE.MAX_ITER) is "
            f"{now[MAX_ITER]}, but the run that --resume continues has done {finished} iterations. "
            f"Give {finished} or more, or start a new run in another OUTPUT_DIR."
        )
    old, new = before.get(BURN_IN), now.get(BURN_IN)
    if old is not None and new is not None and old != new and finished > min(old, new):
        yield ConfigError(
            f"S4M.BURN_IN is {new} and was {old}, but the run that --resume continues has done "
            f"{finished} iterations, more than the shorter of the two. Leave S4M.BURN_IN at {old}, "
            "or start a new run in another OUTPUT_DIR."
        )


class RunStateHook(HookBase):
    """Makes resuming exact: seeds each iteration, saves settings and random states, compares them.

    The default generators, from which other libraries' layers (dropout) and users' components draw,
    are seeded in each iteration, on every process; their states matter only before the first.
    Positions in the streams of images and in the burn-in follow from the iteration and the settings
    (:func:`run_settings`), of which changed ones give warnings.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._restored: Mapping[str, Any] | None = None

    def check(self, finished: int) -> None:
        """Raises: ConfigError: see :func:`continuation_errors`."""
        before = self._restored["settings"] if self._restored else {}
        raise_all(continuation_errors(finished, before, self.settings))

    def before_train(self) -> None:
        if self._restored is not None and comm.is_main_process():
            rng.restore_default_generators(self._restored["random"])
        elif self._restored is None and self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint does not say with which seed, batch size and burn-in it was made: "
                "the run continues from iteration %d with those of this config.",
                self.trainer.start_iter,
            )

    def before_step(self) -> None:
        keys = self.settings["SEED"], "iteration", self.trainer.iter, comm.get_rank()
        rng.seed_default_generators(rng.derive_seed(*keys))

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings, "random": rng.default_generator_states()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict
        for change in changes(state_dict["settings"], self.settings):
            logger.warning("%s", change)


def with_own_schedule(state: Mapping[str, Any], scheduler: Any) -> Mapping[str, Any]:
    """Replace length and shape of a saved schedule by the config's; its position is kept."""
    hooks = state.get("hooks", {})
    if _SCHEDULE not in hooks:
        return state
    own = scheduler.state_dict()
    shape = {k: own[k] for k in own if k not in ("base_lrs", "last_epoch") and k[0] != "_"}
    return {**state, "hooks": {**hooks, _SCHEDULE: {**hooks[_SCHEDULE], **shape}}}


class ForgivingWriter(EventWriter):
    """A log writer whose write errors do not end the training; records are lost."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer, self._failing = writer, False

    def write(self) -> None:
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
            self._failing = False
        except OSError as error:
            if not self._failing:  # one warning per outage
                logger.warning(
                    "%s cannot write: %s. Training continues without these records; free space or "
                    "correct the permissions.", type(self._writer).__name__, error,
                )  # fmt: skip
            self._failing = True


class UnwrittenMetricsHook(HookBase):
    """Makes metrics.json of a resumed run equal to that of an uninterrupted one.

    Checkpoints contain the values logged since the last line, except times. A resumed run logs them
    again, and removes lines that contain them or are newer than the checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._restored: Mapping[str, tuple[bool, list[tuple[float, int]]]] = {}

    def before_train(self) -> None:
        if not comm.is_main_process():
            return
        for name, (hint, values) in self._restored.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, hint, iteration)
        start = self.trainer.start_iter
        remove_lines(self.path, (start - 1) // PERIOD * PERIOD if self._restored else start)

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # no training since the state was loaded
            return dict(self._restored)
        state = {}
        first = self.trainer.iter // PERIOD * PERIOD  # that is in no line yet
        for name, history in storage.histories().items():
            _, iteration = history.values()[-1]
            if iteration >= first and name not in _TIMES:
                smoothed = storage._smoothing_hints[name]
                count = storage.count_samples(name, PERIOD) if smoothed else 1
                state[name] = smoothed, history.values()[-count:]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict
