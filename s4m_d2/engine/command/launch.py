"""Runs a command in processes that end together; a mistake is one message, a bug a traceback."""

import argparse
import errno
import functools
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.engine.launch import launch as launch_here
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException

from s4m_d2.engine.training.stop_signals import EXIT_STOPPED, listen
from s4m_d2.errors import ConfigError, OutputError, S4MError, WorkerError, printable
from s4m_d2.files import disk_error

Main = Callable[[argparse.Namespace], Any]

_SIGNALED = 128  # exit status of a signal n is 128 + n, as in shells
EXIT_INTERRUPTED = _SIGNALED + signal.SIGINT
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOST = re.compile(  # of a loading process, of gloo and of NCCL
    r"DataLoader worker \(pid.*|Connection (closed|reset) by peer|Broken pipe|remote process exited"
)
_LAYOUT = re.compile(r"(\x1b\[[\d;]*m|[\n\t])")  # of a message: colors, lines of a table


def launch(main: Main, args: argparse.Namespace) -> None:
    """Call ``main(args)`` in every process of a run.

    If a launcher such as torchrun has started the processes (known from its environment variables),
    this one joins them; otherwise Detectron2's ``launch`` starts ``args.num_gpus``. They use NCCL
    with CUDA (one GPU each), else gloo. If a process fails, the others are ended; SystemExit has a
    user's mistake in one message, or the exit status of the process that failed first.

    Args:
        main: importable by name.
        args: of Detectron2's ``default_argument_parser``.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        record(_join)(main, args)
        return
    if args.num_gpus * args.num_machines > 1:  # else it starts no processes
        listen(pass_on=True)
    try:
        counts = args.num_gpus, args.num_machines, args.machine_rank, args.dist_url
        launch_here(_run_and_report, *counts, args=(main, args))
    except ProcessExitedException as error:
        code = error.exit_code
        if code != EXIT_STOPPED:
            remedy = " Continue it with --resume." if code < 0 else ""  # others print their error
            print(f"The run has ended: {error}.{remedy}", file=sys.stderr)
        sys.exit(code if code > 0 else _SIGNALED - code)


def _join(main: Main, args: argparse.Namespace) -> None:
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [n for n in (*numbers, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}: use torchrun, which "
            "sets them all, or unset RANK and WORLD_SIZE and use --num-gpus."
        )
    rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in numbers)
    if world_size > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT)
        comm.create_local_process_group(local_size)
        comm.synchronize()
    with plain_endings(_rank()):
        main(args)
    if world_size > 1:  # only after success: it may wait for the others
        dist.destroy_process_group()


def _run_and_report(main: Main, args: argparse.Namespace) -> None:
    """Run; each of several processes writes its traceback, as the launcher shows only one."""
    try:
        with plain_endings(_rank()):
            main(args)
    except Exception:
        if comm.get_world_size() == 1:
            raise
        sys.exit(_rank() + traceback.format_exc())


def _rank() -> str:
    return f"[rank {comm.get_rank()}] " if comm.get_world_size() > 1 else ""


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
        f"Another process of the run has ended ({found[0].strip(' .')}), maybe as memory ran out: "
        "use fewer DATALOADER.NUM_WORKERS or a smaller batch. --resume continues a training."
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
    """End with ``prefix`` and one message after a user's mistake or Ctrl-C, in log messages too."""
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
