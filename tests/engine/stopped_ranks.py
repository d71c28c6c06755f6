"""Two processes train a toy; one of them gets a signal. Run as a script: FOLDER."""

import itertools
import os
import signal
import sys
from pathlib import Path

import torch
from detectron2.engine import HookBase, SimpleTrainer, default_argument_parser
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.command.launch import launch
from s4m_d2.engine.training.stop_signals import StopHook, listen

SIGNALED_RANK, SIGNALED_ITERATION = 1, 3
WORLD_SIZE, MANY = 2, 100


class Line(nn.Module):
    """Its weight after i steps tells i, with momentum also whether that was restored."""

    def __init__(self, on_forward=lambda: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.on_forward = on_forward

    def forward(self, data):
        self.on_forward()
        return {"loss": self.weight * 1.0}


class Signal(HookBase):
    def before_step(self) -> None:
        if (comm.get_rank(), self.trainer.iter) == (SIGNALED_RANK, SIGNALED_ITERATION):
            signal.raise_signal(signal.SIGUSR1)


class Diary(HookBase):
    def __init__(self, folder: str) -> None:
        self.path = Path(folder, f"rank_{comm.get_rank()}.txt")

    def after_train(self) -> None:
        self.path.write_text(str(self.trainer.iter))


def main(args) -> None:
    listen()
    [folder] = args.opts
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleTrainer(model, itertools.repeat(None), optimizer)
    checkpointer = S4MCheckpointer(model, folder, trainer=trainer)
    trainer.register_hooks([Signal(), StopHook(checkpointer), Diary(folder)])
    trainer.train(0, MANY)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    words = ["--num-gpus", str(WORLD_SIZE), "--dist-url", "auto", *sys.argv[1:]]
    launch(main, default_argument_parser().parse_args(words))
