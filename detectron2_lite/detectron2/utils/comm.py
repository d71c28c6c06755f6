"""Communication between the processes of one run; without a process group, a world of one.

Objects travel through torch.distributed's own object collectives, so that only what this run's
processes sent is ever decoded.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_local_process_group: dist.ProcessGroup | None = None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def is_main_process() -> bool:
    return get_rank() == 0


@functools.lru_cache
def create_local_process_group(num_workers_per_machine: int) -> None:
    """Create the group of this machine's ranks, as ``launch`` does; all processes call it."""
    global _local_process_group
    for first in range(0, get_world_size(), num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)  # a collective call: every rank creates every group
        if get_rank() in ranks:
            _local_process_group = group


def get_local_process_group() -> dist.ProcessGroup:
    assert _local_process_group is not None, (
        "There is no local process group. Start the processes with launch(), or call "
        "comm.create_local_process_group(workers_per_machine) after init_process_group()."
    )
    return _local_process_group


def get_local_rank() -> int:
    return dist.get_rank(get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() > 1:
        is_nccl = dist.get_backend() == dist.Backend.NCCL
        dist.barrier(device_ids=[torch.cuda.current_device()] if is_nccl else None)


@functools.lru_cache
def _get_global_gloo_group() -> dist.ProcessGroup:
    """All ranks, over gloo, so that gathered objects take no GPU memory."""
    is_nccl = dist.get_backend() == dist.Backend.NCCL
    return dist.new_group(backend="gloo") if is_nccl else dist.group.WORLD


def all_gather(data: Any) -> list:
    """A picklable object of every rank, in rank order, on every rank."""
    if get_world_size() == 1:
        return [data]
    output = [None] * get_world_size()
    dist.all_gather_object(output, data, group=_get_global_gloo_group())
    return output


def gather(data: Any, dst: int = 0) -> list:
    """A picklable object of every rank, in rank order, on rank ``dst``; [] on the others."""
    if get_world_size() == 1:
        return [data]
    output = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(data, output, dst=dst, group=_get_global_gloo_group())
    return output or []


def shared_random_seed() -> int:
    """A random number that is the same in all processes; all of them call this."""
    return all_gather(np.random.randint(2**31))[0]
