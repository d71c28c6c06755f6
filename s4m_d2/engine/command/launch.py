"""Runs a command in one or several processes, and ends all of them if one fails."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.engine.launch import launch as launch_here
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing import ProcessExitedException

from s4m_d2.engine.command.failures import plain_endings
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED, listen
from s4m_d2.errors import ConfigError

Main = Callable[[argparse.Namespace], Any]

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # of a launcher
_SIGNALED = 128  # exit status of a signal n is 128 + n, as in shells


def launch(main: Main, args: argparse.Namespace) -> None:
    """Call ``main(args)`` in every process of a run.

    If a launcher such as torchrun has started the processes (known from its environment variables),
    this process joins them; otherwise Detectron2's ``launch`` starts ``args.num_gpus`` processes.
    They use NCCL with CUDA (one GPU each), else gloo.

    If a process fails, it writes its error to stderr, and the launcher ends the others: at once, or
    after 30 s those that do not react. SystemExit then has a message without traceback for a user's
    mistake, or the exit status of the process that failed first.

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
        launch_here(
            _run_and_report,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
        )
    except ProcessExitedException as error:
        code = error.exit_code
        if code != EXIT_STOPPED:
            remedy = " Continue it with --resume." if code < 0 else ""  # others print their error
            print(f"The run has ended: {error}.{remedy}", file=sys.stderr)
        sys.exit(code if code > 0 else _SIGNALED - code)


def _join(main: Main, args: argparse.Namespace) -> None:
    with plain_endings():
        missing = [n for n in (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
        if missing:
            raise ConfigError(
                f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}: start the processes "
                "with torchrun, which sets them all, or unset RANK and WORLD_SIZE and use "
                "--num-gpus."
            )
        rank, world_size, local_rank, local_size = (int(os.environ[name]) for name in _NUMBERS)
    if world_size > 1:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
            backend = "nccl"
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=DEFAULT_TIMEOUT)
        comm.create_local_process_group(local_size)
        comm.synchronize()
    with plain_endings(_rank()):
        main(args)
    if world_size > 1:  # only after success: it may wait for the others
        dist.destroy_process_group()


def _run_and_report(main: Main, args: argparse.Namespace) -> None:
    """Run and write tracebacks in each of several processes: the launcher shows only one error,
    which may be a consequence of another process' failure."""
    try:
        with plain_endings(_rank()):
            main(args)
    except Exception:
        if comm.get_world_size() == 1:
            raise
        sys.exit(_rank() + traceback.format_exc())


def _rank() -> str:
    return f"[rank {comm.get_rank()}] " if comm.get_world_size() > 1 else ""
