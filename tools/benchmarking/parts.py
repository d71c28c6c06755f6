"""The parts of a step: what each does, in our form and, where there is one, in the plain form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def in_order(parts: list[Part], order: tuple[str, ...]) -> list[Part]:
    """Parts as a step runs them."""
    return sorted(parts, key=lambda part: order.index(part.name))
