"""What keeps the processes of a run together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, defaults
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn


@contextlib.contextmanager
def ddp_on_any_device() -> Iterator[None]:
    """Let ``DefaultTrainer`` be made in several processes without a GPU too.

    Detectron2's ``create_ddp_model`` always names a GPU, which DistributedDataParallel refuses for
    a model on the CPU, and ``DefaultTrainer`` offers no other place to say so.
    """
    create_ddp_model = defaults.create_ddp_model

    def create(model: nn.Module, **kwargs):
        if next(model.parameters()).device.type == "cpu":
            kwargs["device_ids"] = None
        return create_ddp_model(model, **kwargs)

    defaults.create_ddp_model = create
    try:
        yield
    finally:
        defaults.create_ddp_model = create_ddp_model


class BufferSyncHook(HookBase):
    """Give the model of every process the first one's buffers after each step.

    DDP keeps parameters alike. Buffers it leaves alone in Detectron2's trainers, so that the
    running averages of a plain BatchNorm, each over the images of one process, would make the EMA
    teachers label differently, and each process evaluate another model than the one that is saved.
    FrozenBN and SyncBN have the same buffers everywhere, which stay as they are.

    Register it before hooks that save, average or evaluate the model.

    Args:
        model: the trained model, without a DDP wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def after_step(self) -> None:
        buffers = list(self.model.buffers())
        if comm.get_world_size() == 1 or not buffers:
            return
        parts = [buffer.contiguous().reshape(-1).view(torch.uint8) for buffer in buffers]
        content = torch.cat(parts)
        dist.broadcast(content, src=0)
        for buffer, part in zip(buffers, content.split([len(p) for p in parts]), strict=True):
            buffer.copy_(part.clone().view(buffer.dtype).view(buffer.shape))  # clone: alignment


class FinishedEvalHook(EvalHook):
    """Detectron2's hook, but for a run that fails in its last iteration.

    Detectron2 evaluates then too. A process that has failed would wait in the evaluation for the
    others, which wait for its gradients.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
