"""A command of which the second process fails while the first one waits for it."""

import os
import signal
import sys
from argparse import ArgumentParser, Namespace

import torch.distributed as dist
from detectron2.utils import comm

from s4m_d2.engine.command.launch import launch
from s4m_d2.errors import DatasetError


def fail(how: str) -> None:
    if how == "mistake":
        raise DatasetError("frankfurt_000000_000294.png is truncated.")
    if how == "bug":
        raise ZeroDivisionError("the second process cannot go on")
    os.kill(os.getpid(), signal.SIGKILL)


def main(args: Namespace) -> None:
    comm.synchronize()
    if comm.get_rank() == 1:
        fail(args.how)
    dist.barrier()  # never: the second process will not come


def arguments(how: str, num_gpus: int = 1) -> Namespace:
    return Namespace(how=how, num_gpus=num_gpus, num_machines=1, machine_rank=0, dist_url="auto")


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("how")
    parser.add_argument("--num-gpus", type=int, default=1)
    options = parser.parse_args(sys.argv[1:])
    launch(main, arguments(options.how, options.num_gpus))
