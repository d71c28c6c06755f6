"""Stop signals (SIGTERM, SIGUSR1, Ctrl-C): the run saves after the current iteration and exits.

Schedulers send the first two before they kill a job. Handlers only set a flag, which the run reads
when its state is consistent. All processes stop together, whichever of them got the signal.
"""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer, numbered_name

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)
_SAME_KEY = 1.0  # s; another SIGINT within it is the same Ctrl-C, passed on by a launcher
EXIT_STOPPED = 75  #: exit status: EX_TEMPFAIL; not 0, so that no command that follows starts

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run was saved after a signal. Not an Exception, which Detectron2's loop would log."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class _Interrupted(BaseException):
    """Ends what is :func:`interruptible`; never leaves it."""


@dataclass
class _Note:
    """State of this process' handlers."""

    process: int = 0  # the listening process; forked processes inherit handlers and state
    received: signal.Signals | None = None
    at: float = 0.0  # time.monotonic() of the first
    passes_on: bool = False  # this process is the launcher of the ranks
    interrupts: bool = False  # what is done now may be interrupted


_note = _Note()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _note.process:  # a forked process: the default action
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
        raise _Interrupted


def listen(*, pass_on: bool = False) -> dict[int, Any]:
    """Install the handlers of the stop signals; returns the previous handlers.

    With ``pass_on`` signals are also sent to a launcher's ranks, the children of this process.
    """
    _note.process, _note.passes_on, _note.received = os.getpid(), pass_on, None
    return {number: signal.signal(number, _on_signal) for number in STOP_SIGNALS}


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end what is done inside at once; before and after it comes stop_if_asked."""
    try:
        _note.interrupts = True
        try:
            yield
        finally:
            _note.interrupts = False
    except (_Interrupted, RuntimeError):  # a loading process was killed by it
        if _note.received is None:
            raise


def stop_if_asked() -> None:
    """End all processes, which all call it, if one of them got a signal; Stopped."""
    if any(comm.all_gather(_note.received is not None)):
        name = _note.received.name if _note.received else "a signal to another process"
        _note.received = None
        logger.warning("Stopped by %s; the run is saved. Continue it with --resume.", name)
        raise Stopped


class StopHook(HookBase):
    """Saves and ends the run after the iteration in which one of its processes got a stop signal.

    Register it after hooks that have state or save, before evaluation. Needs :func:`listen`.
    """

    def __init__(self, checkpointer: S4MCheckpointer) -> None:
        self._checkpointer = checkpointer
        self.stopping = False  #: the run is being stopped by a signal
        self._completed: int | None = None  # the last completed iteration

    def after_step(self) -> None:
        self._completed = self.trainer.iter
        self._stop_if_asked()

    @contextmanager
    def during_evaluation(self) -> Iterator[None]:
        """Let a signal interrupt an evaluation at once, if the run has one process.

        Several processes finish it, because the others would wait for one that leaves.
        """
        self._stop_if_asked()
        with interruptible() if comm.get_world_size() == 1 else nullcontext():
            yield
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if not any(comm.all_gather(_note.received is not None)):
            return
        self.stopping = True
        done = self.trainer.iter  # after training: max_iter; the last iteration is saved then
        if self._completed == done != self._checkpointer.saved_iteration:
            self._checkpointer.save(numbered_name(done), iteration=done)
        stop_if_asked()  # and wait until the file is complete
