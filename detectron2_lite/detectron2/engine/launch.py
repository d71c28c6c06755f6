"""Start one function in one process per device."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

__all__ = ["DEFAULT_TIMEOUT", "launch"]

DEFAULT_TIMEOUT = timedelta(minutes=30)


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
        num_gpus_per_machine: processes per machine: over NCCL with one GPU each where CUDA is
            available, over gloo on the CPU where it is not.
        machine_rank: this machine's place in [0, num_machines); every machine calls ``launch``.
        dist_url: address of rank 0, "tcp://HOST:PORT", or "auto" for a free port here.
        timeout: of the collective operations.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if dist_url == "auto":
        assert num_machines == 1, "dist_url=auto is for one machine only; give rank 0's address"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    first_rank = machine_rank * num_gpus_per_machine
    group_args = dist_url, timeout, world_size
    worker_args = main_func, args, num_gpus_per_machine, first_rank, group_args
    mp.start_processes(_distributed_worker, worker_args, nprocs=num_gpus_per_machine)


def _distributed_worker(local_rank, main_func, args, num_local, first_rank, group_args) -> None:
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        count = torch.cuda.device_count()
        assert num_local <= count, f"{num_local} GPUs asked for, {count} found"
        torch.cuda.set_device(local_rank)
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(backend, *group_args, rank=first_rank + local_rank)
    comm.create_local_process_group(num_local)
    comm.synchronize()
    main_func(*args)
    dist.destroy_process_group()
