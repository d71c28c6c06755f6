"""What a run logs: on a disk that may be full for a while, and once, however often it is killed."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

PERIOD = 20  # iterations between two lines of metrics.json, and of a median in it: Detectron2's
_TIMES = ("data_time", "eta_seconds", "rank_data_time", "time")  # the process', not the run's

logger = logging.getLogger(__name__)


class ForgivingWriter(EventWriter):
    """A writer whose failures to write end no training, but lose what it had to write.

    Args:
        writer: of metrics.json or TensorBoard's files.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failing = False

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

    Args:
        path: of the file.
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
    """Shorten a file of JSON lines, in place, to what was written before an iteration's line.

    Half a line at the end, which a killed process left, goes too. There may be no such file, and a
    file that cannot be written stays, with a warning.
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
    """Whether a line is not the record of an iteration or of a later one, nor half a line."""
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] < iteration
    except (ValueError, LookupError, TypeError):
        return line.endswith(b"\n")
