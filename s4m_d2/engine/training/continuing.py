"""Exact resuming: comparison of settings, random states, learning rates and metrics.json."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from s4m_d2.engine.checks.findings import raise_all
from s4m_d2.engine.rng import default_generator_states, restore_default_generators
from s4m_d2.errors import ConfigError

logger = logging.getLogger(__name__)

_ITERATION = re.compile(rb'"iteration": (\d+)')
PERIOD = 20  # iterations between lines of metrics.json, and in a median of it (Detectron2)
_TIMES = ("data_time", "eta_seconds", "rank_data_time", "time")  # not restored
_SCHEDULE = "LRScheduler"  # Detectron2's hook

MAX_ITER, BURN_IN, PROCESSES = "SOLVER.MAX_ITER", "S4M.BURN_IN", "processes"
_BATCH, _UNLABELED_BATCH = "SOLVER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"
_OF_BOTH_STAGES = ("SEED", "DATASETS.TRAIN", "S4M.SPLIT_SEED", _BATCH, MAX_ITER)
_OF_STAGE_2 = ("DATASETS.UNLABELED", _UNLABELED_BATCH, BURN_IN, "S4M.EMA_DECAY")


def run_settings(cfg: CfgNode, processes: int, *, has_teacher: bool) -> dict[str, Any]:
    """Settings that determine a stage's training, by config key; ``processes`` share a batch."""
    settings: dict[str, Any] = {PROCESSES: processes}
    for name in (*_OF_BOTH_STAGES, *(_OF_STAGE_2 if has_teacher else ())):
        value = functools.reduce(getattr, name.split("."), cfg)
        settings[name] = tuple(value) if isinstance(value, list | tuple) else value
    if has_teacher:
        settings[_UNLABELED_BATCH] = settings[_UNLABELED_BATCH] or settings[_BATCH]
    return settings


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
    """Saves the run's settings and random states in checkpoints, and compares them on resume.

    Positions in the streams of images and in the burn-in follow from the iteration and the settings
    (:func:`run_settings`); changed settings give warnings. The default generators are seeded in
    each iteration (:class:`SeedHook`); their states matter only before the first.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._restored: Mapping[str, Any] | None = None

    def check(self, finished: int) -> None:
        """Raises: ConfigError: see :func:`continuation_errors`."""
        before = self._restored["settings"] if self._restored else {}
        raise_all(continuation_errors(finished, before, self.settings))

    def before_train(self) -> None:
        if self._restored is not None and comm.is_main_process():
            restore_default_generators(self._restored["random"])
        elif self._restored is None and self.trainer.start_iter > 0:
            logger.warning(
                "The checkpoint does not say with which seed, batch size and burn-in it was made: "
                "the run continues from iteration %d with those of this config.",
                self.trainer.start_iter,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "random": default_generator_states()}

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

    Checkpoints contain the values logged since the last line, except times. A resumed run logs
    them again, and removes the lines that contain them or were written after the checkpoint.
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
        remove_lines(self.path, _unwritten(start - 1) if self._restored else start)

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:  # no training since the state was loaded
            return dict(self._restored)
        state = {}
        for name, history in storage.histories().items():
            _, iteration = history.values()[-1]
            if iteration >= _unwritten(self.trainer.iter) and name not in _TIMES:
                smoothed = storage._smoothing_hints[name]
                count = storage.count_samples(name, PERIOD) if smoothed else 1
                state[name] = smoothed, history.values()[-count:]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict


def _unwritten(iteration: int) -> int:
    """First iteration that is in no line yet when a checkpoint of ``iteration`` is saved."""
    return iteration // PERIOD * PERIOD


def remove_lines(path: str, first: int) -> None:
    """Truncate a file of JSON lines before the first record of ``first`` or a later iteration.

    An incomplete last line of a killed process is removed too.
    """
    if not os.path.isfile(path):
        return
    size = 0
    with open(path, "rb+") as file:
        for line in file:
            found = _ITERATION.search(line)
            if not line.endswith(b"\n") or (found and int(found[1]) >= first):
                break
            size += len(line)
        file.truncate(size)
