"""The parts of a step: what each does, in our form and, where there is one, in the plain form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarking import ours
from benchmarking.bench import Bench
from benchmarking.timing import Form

#: Parts that are inside another one and so do not count again in the sum of a step.
INSIDE = {"points": "refinement", "matching": "losses", "deformable attention": "student forward"}
#: The method's own operations, whose plain forms the project promises to beat.
METHOD_PARTS = ("points", "arp", "ema")


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: as in the tables.
        ours, plain: the forms; None: what the plain form does is the same.
        check: raises Mismatch if the forms differ.
        moved_bytes: that the part cannot avoid to read and write; 0: it is bound by arithmetic, or
            not looked at.
        counts_flops: whether its bound is the arithmetic of what it runs.
        in_step: whether a step waits for it; the data are loaded by other processes.
    """

    name: str
    ours: Form
    plain: Form | None = None
    check: Callable[[], None] | None = None
    moved_bytes: int = 0
    counts_flops: bool = False
    in_step: bool = True

    @property
    def forms(self) -> dict[str, Form]:
        """The forms by name."""
        return {"ours": self.ours, **({"plain": self.plain} if self.plain else {})}


def model_parts(bench: Bench, batches: list[list[dict]]) -> list[Part]:
    """Student forward, losses, backward and optimizer, which both stages have."""
    wanted = [ours.targets(bench, batch) for batch in batches]

    def forward() -> list[dict]:
        return [outputs for _, outputs in ours.student_outputs(bench, batches)]

    def detached() -> tuple:
        with torch.no_grad():
            return (forward(),)

    def losses(outputs: list[dict]):
        return ours.losses(bench, outputs, wanted, batches)

    def graph() -> tuple:
        bench.optimizer.zero_grad()
        return (losses(forward()),)

    def gradients() -> tuple:
        if not has_gradients(bench):
            graph()[0].backward()
        return ()

    tensors = [p for group in bench.optimizer.param_groups for p in group["params"]]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return [
        Part("student forward", Form(forward), counts_flops=True),
        Part("losses", Form(losses, detached)),
        Part("backward", Form(lambda loss: loss.backward(), graph), counts_flops=True),
        # clipping reads the gradients twice and writes them; the update reads four, writes three
        Part("optimizer", Form(lambda: bench.optimizer.step(), gradients), moved_bytes=10 * size),
    ]


def has_gradients(bench: Bench) -> bool:
    """Whether a backward pass has been run."""
    groups: list[dict[str, Any]] = bench.optimizer.param_groups
    return any(p.grad is not None for group in groups for p in group["params"])


def in_order(parts: list[Part], order: tuple[str, ...]) -> list[Part]:
    """Parts as a step runs them."""
    return sorted(parts, key=lambda part: order.index(part.name))
