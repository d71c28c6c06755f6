"""Communication between the processes of one training run.

Objects travel through ``torch.distributed``'s own object collectives, so only what the
processes of this run sent is ever decoded. Every function also works without a process group,
where it acts as a world of one process.
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
    """Create the group of the ranks on this machine; all processes must call it together.

    ``launch`` does this. Processes started in another way call it once after
    ``init_process_group``; ``get_local_rank`` and ``get_local_size`` need it.
    """
    global _local_process_group
    assert _local_process_group is None, "the local process group exists already"
    world_size = get_world_size()
    assert world_size % num_workers_per_machine == 0, (world_size, num_workers_per_machine)
    for first in range(0, world_size, num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)  # a collective call: every rank creates every group
        if get_rank() in ranks:
            _local_process_group = group


def get_local_process_group() -> dist.ProcessGroup:
    """The group of the processes on this machine."""
    assert _local_process_group is not None, (
        "The local process group does not exist. Start the processes with launch(), or call "
        "comm.create_local_process_group(workers_per_machine) after init_process_group()."
    )
    return _local_process_group


def get_local_rank() -> int:
    return dist.get_rank(group=get_local_process_group()) if _is_distributed() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _is_distributed() else 1


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _get_global_gloo_group() -> dist.ProcessGroup:
    """All ranks, over gloo, so that gathered objects do not occupy GPU memory."""
    if dist.get_backend() == dist.Backend.NCCL:
        return dist.new_group(backend="gloo")
    return dist.group.WORLD


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list:
    """Collect a picklable object from every rank on every rank, in rank order."""
    if get_world_size() == 1:
        return [data]
    group = group or _get_global_gloo_group()
    output = [None] * dist.get_world_size(group)
    dist.all_gather_object(output, data, group=group)
    return output


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list:
    """Collect a picklable object from every rank on ``dst``, in rank order; others get []."""
    if get_world_size() == 1:
        return [data]
    group = group or _get_global_gloo_group()
    is_receiver = dist.get_rank(group) == dst
    output = [None] * dist.get_world_size(group) if is_receiver else None
    dist.gather_object(data, output, dst=dst, group=group)
    return output if is_receiver else []


def shared_random_seed() -> int:
    """A random number that is the same in all processes; all of them must call this."""
    return all_gather(np.random.randint(2**31))[0]


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict:
    """Sum or average scalar tensors over the ranks; only rank 0 holds the full result."""
    world_size = get_world_size()
    if world_size < 2:
        return input_dict
    with torch.no_grad():
        names = sorted(input_dict)  # the same order on every rank
        values = torch.stack([input_dict[name] for name in names])
        dist.reduce(values, dst=0)
        if average and is_main_process():
            values /= world_size
    return dict(zip(names, values, strict=True))
