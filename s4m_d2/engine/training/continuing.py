"""What makes a continued run the run that nothing stopped: its settings, draws, rates and logs."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
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

PERIOD = 20  # iterations between two lines of metrics.json, and of a median in it: Detectron2's
_TIMES = ("data_time", "eta_seconds", "rank_data_time", "time")  # the process', not the run's
_SCHEDULE = "LRScheduler"  # Detectron2's hook

MAX_ITER, BURN_IN, PROCESSES = "SOLVER.MAX_ITER", "S4M.BURN_IN", "processes"
_BATCH, _UNLABELED_BATCH = "SOLVER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"
# setting -> what a continued run does otherwise if it has changed
_OF_BOTH_STAGES = {
    "SEED": "other images come next, and all draws differ",
    "DATASETS.TRAIN": "other labeled images come next",
    "S4M.SPLIT_SEED": "other images are labeled",
    _BATCH: "labeled images are skipped or come again",
    MAX_ITER: "from here on, the learning rate is that of a run of the new length",
}
_OF_STAGE_2 = {
    "DATASETS.UNLABELED": "other unlabeled images come next",
    _UNLABELED_BATCH: "unlabeled images are skipped or come again",
    BURN_IN: "the teacher is frozen, copied and averaged in other iterations",
    "S4M.EMA_DECAY": "the teacher follows the student at another pace",
}
_CONSEQUENCES = _OF_BOTH_STAGES | _OF_STAGE_2
_CONSEQUENCES[PROCESSES] = "the same images come next, but the processes share and draw otherwise"


def run_settings(cfg: CfgNode, processes: int, *, has_teacher: bool) -> dict[str, Any]:
    """What a stage's course depends on, by config key; ``processes`` share a batch."""
    settings: dict[str, Any] = {PROCESSES: processes}
    for name in (*_OF_BOTH_STAGES, *(_OF_STAGE_2 if has_teacher else ())):
        value = functools.reduce(getattr, name.split("."), cfg)
        settings[name] = tuple(value) if isinstance(value, list | tuple) else value
    if has_teacher:
        settings[_UNLABELED_BATCH] = settings[_UNLABELED_BATCH] or settings[_BATCH]
    return settings


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What a continued run does otherwise, by settings (:func:`run_settings`) then and now."""
    for name, value in now.items():
        if before.get(name, value) != value:
            yield (
                f"{name} was {before[name]} when the checkpoint was written and is {value} now: "
                f"{_CONSEQUENCES[name]}."
            )


def continuation_errors(
    finished: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[ConfigError]:
    """Settings with which a run cannot continue after so many iterations; as for ``changes``."""
    if now[MAX_ITER] < finished:
        yield ConfigError(
            f"SOLVER.MAX_ITER (stage 1: S4M.TEACHER.MAX_ITER) is {now[MAX_ITER]}, but the run that "
            f"--resume continues has done {finished} iterations. Give {finished} or more, or start "
            "a new run in another OUTPUT_DIR."
        )
    old, new = before.get(BURN_IN), now.get(BURN_IN)
    if old is not None and new is not None and old != new and finished > min(old, new):
        yield ConfigError(
            f"S4M.BURN_IN is {new} and was {old} before, but the run that --resume continues has "
            f"done {finished} iterations, more than the shorter of the two: its teacher cannot "
            f"begin to follow the student at another time. Leave S4M.BURN_IN at {old}, or start a "
            "new run in another OUTPUT_DIR."
        )


class RunStateHook(HookBase):
    """Puts the run's settings and random states into checkpoints, and compares them on resume.

    Positions in the streams of images and in the burn-in follow from the iteration and the settings
    (:func:`run_settings`), each change of which is a warning. Files without this state, of other
    programs, are continued all the same. The default generators, which
    :class:`~s4m_d2.engine.SeedHook` seeds in each iteration, matter to what draws before the first.
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
                "the run continues from iteration %d with the order of images and the draws of "
                "this config.",
                self.trainer.start_iter,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "random": default_generator_states()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._restored = state_dict
        for change in changes(state_dict["settings"], self.settings):
            logger.warning("%s", change)


def with_own_schedule(state: Mapping[str, Any], scheduler: Any) -> Mapping[str, Any]:
    """A trainer's state with a schedule that follows the config; the checkpoint's is its position.

    Some schedulers save their length and shape too.
    """
    hooks = state.get("hooks", {})
    if _SCHEDULE not in hooks:
        return state
    own = scheduler.state_dict()
    shape = {k: own[k] for k in own if k not in ("base_lrs", "last_epoch") and k[0] != "_"}
    return {**state, "hooks": {**hooks, _SCHEDULE: {**hooks[_SCHEDULE], **shape}}}


class ForgivingWriter(EventWriter):
    """A writer of logs whose failures to write end no training, but lose what it had to write."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer, self._failing = writer, False

    def write(self) -> None:
        self._try(self._writer.write)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Callable[[], None]) -> None:
        """Report each outage once."""
        try:
            action()
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s cannot write: %s. Training goes on without these records; free space or "
                    "correct the permissions.", type(self._writer).__name__, error,
                )  # fmt: skip
            self._failing = True


class UnwrittenMetricsHook(HookBase):
    """Gives a continued run the lines of metrics.json that it would have without the stop.

    What was logged since the last line, but for times, is part of a checkpoint. A continued run
    logs it again, and removes the lines that hold it or that were written after the checkpoint.
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
        if storage is None:  # nothing was trained since the state was loaded, if it was
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
    """The first iteration whose values no line holds when a checkpoint of this one is saved."""
    return iteration // PERIOD * PERIOD


def remove_lines(path: str, first: int) -> None:
    """Shorten a file of JSON lines, if it exists, to what was written before an iteration's line.

    Half a line at the end, which a killed process left, goes too.
    """
    if not os.path.isfile(path):
        return
    try:
        with open(path, "rb+") as file:
            kept = itertools.takewhile(lambda line: _is_before(line, first), file)
            size = sum(map(len, kept))
            file.truncate(size)
    except OSError as error:
        logger.warning("%s keeps lines that are written again: %s", path, error)


def _is_before(line: bytes, iteration: int) -> bool:
    """Whether a line is whole and not the record of an iteration or of a later one."""
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < iteration
    except (ValueError, LookupError, TypeError):
        return line.endswith(b"\n")
