"""SIGTERM, SIGUSR1, Ctrl-C: a run saves itself after the iteration in which one arrives, and ends.

Schedulers send the first two before they kill a job. A handler takes a note; the run looks at it
where its state is consistent. All processes stop together, whichever of them got the signal.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checkpointing.checkpoint_files import numbered_name

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
_SAME_KEY = 1.0  # s; within them another SIGINT is the same Ctrl-C, passed on by a launcher
#: Exit status of a run that was stopped and waits to be continued: "temporary failure, try again"
#: of sysexits.h. Not 0, so that what comes after a training does not start.
EXIT_STOPPED = 75

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run has saved itself because a signal asked for it. Ends the process with EXIT_STOPPED.

    No Exception, which Detectron2's loop would log as a failure.
    """

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class _EvaluationInterrupted(BaseException):
    """Ends an evaluation at once; never leaves this module."""


@dataclass
class _Note:
    """What the handlers of this process know."""

    process: int = 0  # that listens: processes forked from it inherit handlers and note
    received: signal.Signals | None = None
    at: float = 0.0  # time.monotonic() of the first
    passes_on: bool = False  # this process waits for the ranks that it started
    interrupts: bool = False  # within an evaluation that may end at once


_note = _Note()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _note.process:  # forked from it: there the signal means what it always does
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _note.received is None:
        _note.received, _note.at = signal.Signals(number), time.monotonic()
        if number == signal.SIGINT and comm.is_main_process() and not _note.passes_on:
            os.write(2, b"Saving and stopping; another Ctrl-C ends at once.\n")
    elif number == signal.SIGINT and time.monotonic() - _note.at > _SAME_KEY:
        raise KeyboardInterrupt
    if _note.passes_on:
        for child in multiprocessing.active_children():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(child.pid, number)  # type: ignore[arg-type]
    if _note.interrupts:
        _note.interrupts = False
        raise _EvaluationInterrupted


def listen(*, pass_on: bool = False) -> dict[int, Any]:
    """Take note of the stop signals from now on; returns the handlers that were there before.

    For programs: they own signals. With ``pass_on`` children of this process get them too.
    """
    _note.process, _note.passes_on, _note.received = os.getpid(), pass_on, None
    return {number: signal.signal(number, _on_signal) for number in STOP_SIGNALS}


@contextmanager
def passed_on_to_ranks(world_size: int) -> Iterator[None]:
    """Around Detectron2's ``launch``: ranks get the launcher's signals, it ends as they do."""
    if world_size > 1:  # else it starts no processes
        listen(pass_on=True)
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code == EXIT_STOPPED:
            raise Stopped from None
        raise


class StopHook(HookBase):
    """Saves and ends the run after the iteration in which a process of it got a stop signal.

    Stands after the hooks that hold state and save, and before evaluation. Needs :func:`listen`.

    Args:
        checkpointer: of the trainer; only the main process writes.

    Attributes:
        stopping: the run is ending because of a signal: nothing long should begin.
    """

    def __init__(self, checkpointer: S4MCheckpointer) -> None:
        self._checkpointer = checkpointer
        self.stopping = False
        self._completed: int | None = None  # the last iteration that ended

    def after_step(self) -> None:
        self._completed = self.trainer.iter
        self._stop_if_asked()

    @contextmanager
    def during_evaluation(self) -> Iterator[None]:
        """Around an evaluation, which a signal ends at once if no other process takes part.

        Several processes finish it, because one that left would make the others wait.
        """
        self._stop_if_asked()
        alone = comm.get_world_size() == 1
        try:
            _note.interrupts = alone
            try:
                yield
            finally:
                _note.interrupts = False
        except (_EvaluationInterrupted, RuntimeError):  # of a loading process that died of it
            if not alone or _note.received is None:
                raise
            self._stop()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if any(comm.all_gather(_note.received is not None)):
            self._stop()

    def _stop(self) -> None:
        self.stopping = True
        name = _note.received.name if _note.received else "a signal to another process"
        _note.received = None
        done = self.trainer.iter  # after training: one past the last, which is saved
        if self._completed == done != self._checkpointer.saved_iteration:
            self._checkpointer.save(numbered_name(done), iteration=done)
        comm.synchronize()  # no process is gone before the file is complete
        logger.warning("Stopped by %s; the run is saved. Continue it with --resume.", name)
        raise Stopped
