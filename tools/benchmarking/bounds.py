"""What the machine can do at most, and how near to it a part comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarking.parts import Part
from benchmarking.timing import Clock, Form, measure, summarize

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Measured peaks: operations (multiplications and additions) and bytes a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Bound:
    """The time that a part cannot go below.

    Attributes:
        kind: "arithmetic" or "bandwidth".
        amount: operations, or bytes read and written.
        seconds: amount over the machine's peak.
    """

    kind: str
    amount: float
    seconds: float


def measure_machine(device: torch.device, clock: Clock, *, half: bool) -> Machine:
    """A large matrix product, in half precision where the training uses it, and a large copy."""
    side = MATRIX_SIDE[device.type]
    dtype = torch.float16 if half else torch.float32
    left, right = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    source = torch.zeros(COPIED_BYTES[device.type] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    forms = {
        "product": Form(lambda: torch.mm(left, right)),
        "copy": Form(lambda: target.copy_(source)),
    }
    times = {
        name: summarize(values).median
        for name, values in measure(forms, clock, repeats=REPEATS, warmup=2).items()
    }
    return Machine(2 * side**3 / times["product"], 2 * source.numel() / times["copy"])


def bound_of(part: Part, machine: Machine) -> Bound | None:
    """The bound of our form of a part; None where none is known."""
    if part.moved_bytes:
        return Bound("bandwidth", part.moved_bytes, part.moved_bytes / machine.bytes)
    if not part.counts_flops:
        return None
    arguments = part.ours.prepare()
    with FlopCounterMode(display=False) as counter:
        part.ours.run(*arguments)
    flops = float(counter.get_total_flops())
    return Bound("arithmetic", flops, flops / machine.flops)
