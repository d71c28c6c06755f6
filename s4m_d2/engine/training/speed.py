"""Options that make a run faster: the precision of mixed-precision training, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import Tensor, nn

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


def compile_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Compile a model's parts in place; modules and weights keep their names.

    The parts are those that the model's ``compiled_parts`` names, or else its ``backbone``. They
    are compiled with their first inputs, and once more with symbolic sizes when others come.

    Args:
        backend: of torch.compile.

    Raises:
        ConfigError: there is nothing to compile, or no compiler that works.
    """
    names = getattr(model, "compiled_parts", ("backbone",))
    if not all(isinstance(getattr(model, name.split(".")[0], None), nn.Module) for name in names):
        raise ConfigError(
            f"S4M.COMPILE is True, but {type(model).__name__} has no 'compiled_parts', the names "
            "of submodules to compile, and no 'backbone'. Add the attribute, or set it to False."
        )
    device = next(model.parameters()).device
    try:
        torch.compile(_probe, backend=backend)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"S4M.COMPILE is True, but torch.compile does not work here: {type(error).__name__}: "
            f"{reason[0]} It needs a C++ compiler (g++), Python's header files and, for a GPU, "
            "Triton: install them, or set S4M.COMPILE False."
        ) from error
    for name in names:
        model.get_submodule(name).compile(backend=backend)


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
