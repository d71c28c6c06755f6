"""Errors of a program: one message for users' mistakes, a traceback for bugs."""

from __future__ import annotations

import errno
import functools
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from s4m_d2.errors import OutputError, S4MError, WorkerError, printable
from s4m_d2.files import disk_error

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as in shells
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOST = re.compile(  # of a loading process, of gloo and of NCCL
    r"DataLoader worker \(pid.*|Connection (closed|reset) by peer|Broken pipe|remote process exited"
)
_LAYOUT = re.compile(r"(\x1b\[[\d;]*m|[\n\t])")  # of a message: colors, lines of a table


def as_mistake(error: BaseException | None) -> S4MError | None:
    """Convert errors of disks and processes to S4MError, which is returned as is; None: a bug."""
    if isinstance(error, S4MError):
        return error
    if not isinstance(error, OSError | RuntimeError):
        return None
    cause = disk_error(error)
    if cause is not None and cause.errno in _WRITING:
        file = f"'{cause.filename}'" if cause.filename else "A file of this run"
        return OutputError(
            f"{file} cannot be written: {cause.strerror}. Free space, then run the command again; "
            "--resume continues a training."
        )
    if (found := _LOST.search(str(error))) is None:
        return None
    return WorkerError(
        f"Another process of the run has ended ({found[0].strip(' .')}). If nobody ended it, "
        "memory ran out: use fewer workers (DATALOADER.NUM_WORKERS) or a smaller batch. Run the "
        "command again; --resume continues a training."
    )


def as_text(error: BaseException) -> str:
    """Format an error as one message, with its type."""
    mistake = as_mistake(error)
    return repr(error) if mistake is None else f"{type(mistake).__name__}: {mistake}"


class _Record(logging.LogRecord):
    """A log record whose text is printable, and without tracebacks of users' mistakes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._mistake = as_mistake(self.exc_info[1]) if self.exc_info else None
        if self._mistake is not None:
            self.exc_info = None

    def getMessage(self) -> str:
        if isinstance(self.args, tuple) and "\n" not in str(self.msg):  # a table follows a "\n"
            self.args = tuple(printable(a, len(a)) if isinstance(a, str) else a for a in self.args)
        parts = _LAYOUT.split(super().getMessage())
        message = "".join(p if i % 2 else printable(p, len(p)) for i, p in enumerate(parts))
        return message if self._mistake is None else f"{message} {as_text(self._mistake)}"


@contextmanager
def plain_endings(prefix: str = "") -> Iterator[None]:
    """End a program with one message on stderr after a user's mistake or Ctrl-C.

    Also removes tracebacks of such errors from log messages. ``prefix`` precedes the message.
    """
    if logging.getLogRecordFactory() is not _Record:
        logging.setLogRecordFactory(_Record)
        logging.raiseExceptions = False  # of a log file on a full disk
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # as standard error
        other = threading.excepthook

        def in_thread(args: threading.ExceptHookArgs) -> None:  # of TensorBoard's writer and others
            if as_mistake(args.exc_value) is None:
                other(args)

        threading.excepthook = in_thread
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted. Continue a training with --resume.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if as_mistake(error) is None:
            raise
        sys.exit(prefix + as_text(error))


def exit_status(main: Callable[..., int]) -> Callable[..., int]:
    """Let a command return 1 after a user's mistake, which is printed as one message."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except Exception as error:
            if as_mistake(error) is None:
                raise
            print(as_text(error), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return EXIT_INTERRUPTED

    return run
