"""Two processes, of which the second fails or gets a signal while the first waits: HOW [FOLDER]."""

import itertools
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, SimpleTrainer, default_argument_parser
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.command.launch import launch
from s4m_d2.engine.training.stop_signals import StopHook, listen
from s4m_d2.errors import DatasetError

WORLD_SIZE, SIGNALED_ITERATION, MANY = 2, 3, 100


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, data):
        return {"loss": self.weight * 1.0}


class Signal(HookBase):
    """To the second process; each writes the iteration in which it ended."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder, f"rank_{comm.get_rank()}.txt")

    def before_step(self) -> None:
        if (comm.get_rank(), self.trainer.iter) == (1, SIGNALED_ITERATION):
            signal.raise_signal(signal.SIGUSR1)

    def after_train(self) -> None:
        self.path.write_text(str(self.trainer.iter))


def train(folder: str) -> None:
    listen()
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    checkpointer = S4MCheckpointer(model, folder, trainer=trainer)
    trainer.register_hooks([Signal(folder), StopHook(checkpointer)])
    trainer.train(0, MANY)


def fail(how: str) -> None:
    if how == "mistake":
        raise DatasetError("frankfurt_000000_000294.png is truncated.")
    if how == "bug":
        raise ZeroDivisionError("the second process cannot go on")
    os.kill(os.getpid(), signal.SIGKILL)


def main(args: Namespace) -> None:
    how, *folder = args.opts
    comm.synchronize()
    if how == "stopped":
        train(*folder)
    elif comm.get_rank() == 1:
        fail(how)
    dist.barrier()  # never: the second process will not come


if __name__ == "__main__":
    launch(main, default_argument_parser().parse_args(sys.argv[1:]))
