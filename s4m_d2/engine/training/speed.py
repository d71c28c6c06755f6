"""The precision of mixed-precision training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer

from s4m_d2.errors import ConfigError, S4MError

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability of NVIDIA's GPUs


def speed_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """What is wrong with the precision that the config asks for."""
    name = cfg.S4M.AMP_PRECISION
    if name not in PRECISIONS:
        yield ConfigError(f"S4M.AMP_PRECISION is {name!r}; expected one of {sorted(PRECISIONS)}.")
    elif name == "bfloat16" and cfg.SOLVER.AMP.ENABLED and torch.cuda.is_available():
        if torch.cuda.get_device_capability() < FIRST_WITH_BFLOAT16 and not torch.version.hip:
            yield ConfigError(
                "S4M.AMP_PRECISION is 'bfloat16', which this GPU does not compute with; set it to "
                "'float16'."
            )


def set_precision(trainer: SimpleTrainer, name: str) -> None:
    """Let a trainer with mixed precision compute in a precision; others stay as they are.

    bfloat16 has float32's range: the loss is not scaled, and the host need not wait to learn
    whether scaled gradients overflow, as it does in each step with float16.

    Args:
        name: of PRECISIONS.
    """
    if not isinstance(trainer, AMPTrainer):
        return
    trainer.precision = PRECISIONS[name]
    if trainer.precision == torch.bfloat16:
        trainer.grad_scaler = torch.amp.GradScaler("cuda", enabled=False)
