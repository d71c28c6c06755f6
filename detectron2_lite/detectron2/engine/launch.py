"""Start one function in one process per device."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)


def _find_free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(
    main_func: Callable,
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Run ``main_func(*args)``, in this process for a world of one, else in spawned processes.

    Args:
        main_func: importable by name, because the processes are spawned.
        num_gpus_per_machine: processes per machine. They speak NCCL and own one GPU each where
            CUDA is available, and speak gloo on the CPU where it is not.
        machine_rank: this machine's place in [0, num_machines); every machine calls ``launch``.
        dist_url: address of rank 0, such as "tcp://127.0.0.1:8686", or "auto" for a free port
            on this machine.
        timeout: of the collective operations.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if dist_url == "auto":
        assert num_machines == 1, "dist_url=auto is for one machine only; give rank 0's address"
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    mp.start_processes(
        _distributed_worker,
        nprocs=num_gpus_per_machine,
        args=(
            main_func, world_size, num_gpus_per_machine, machine_rank, dist_url, args, timeout
        ),
        daemon=False,
    )  # fmt: skip


def _distributed_worker(
    local_rank: int,
    main_func: Callable,
    world_size: int,
    num_gpus_per_machine: int,
    machine_rank: int,
    dist_url: str | None,
    args: tuple,
    timeout: timedelta,
) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        count = torch.cuda.device_count()
        assert num_gpus_per_machine <= count, f"{num_gpus_per_machine} GPUs asked, {count} found"
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group(
            backend="nccl" if has_gpu else "gloo",
            init_method=dist_url,
            world_size=world_size,
            rank=machine_rank * num_gpus_per_machine + local_rank,
            timeout=timeout,
        )
    except Exception:
        logging.getLogger(__name__).error(f"No process group could be made at {dist_url}")
        raise
    comm.create_local_process_group(num_gpus_per_machine)
    comm.synchronize()
    main_func(*args)
    dist.destroy_process_group()
