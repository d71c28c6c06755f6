"""Interleaved timing, the memory of a call, and what the machine can do at most."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPIED_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


@dataclass(frozen=True)
class Form:
    """One way to do a part."""

    run: Callable[..., Any]  # is timed
    prepare: Callable[[], tuple] = tuple  # makes its arguments before each call; is not timed

    def __call__(self) -> Any:
        """Prepare and run."""
        return self.run(*self.prepare())


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (linear interpolation) of at least one value."""
    lower, median, upper = (float(q) for q in np.percentile(values, [25, 50, 75]))
    return {"median": median, "lower": lower, "upper": upper, "repeats": len(values)}


class Clock:
    """Seconds on a device, which has finished before a time is read.

    On the CPU with one thread time of the process, which other programs do not stretch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.name = "process time" if alone else "wall time"
        self._now = time.process_time if alone else time.perf_counter

    def read(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._now()

    def time(self, form: Form) -> float:
        """Seconds of one prepared call."""
        arguments = form.prepare()
        start = self.read()
        result = form.run(*arguments)
        seconds = self.read() - start
        del result
        return seconds

    def measure(
        self, forms: Mapping[str, Form], *, repeats: int, warmup: int
    ) -> dict[str, list[float]]:
        """Seconds of each repeat of each form, taken in turns: A B, B A, A B, …"""
        names = list(forms)
        for name in names * warmup:
            self.time(forms[name])
        times: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            for name in names if repeat % 2 == 0 else reversed(names):
                times[name].append(self.time(forms[name]))
        return times


def peak_memory(form: Form, device: torch.device) -> int:
    """Bytes that a call needs beyond what is held before it.

    By CUDA's allocator, or by torch.profiler, which leaves out NumPy's and the libraries' own.
    """
    arguments = form.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        form.run(*arguments)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        form.run(*arguments)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def machine_peaks(clock: Clock, *, half: bool) -> dict[str, float]:
    """Operations and bytes a second, by kind of bound: of a large matrix product and copy."""
    device = clock.device
    side = MATRIX_SIDE[device.type]
    dtype = torch.float16 if half else torch.float32
    left, right = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    source = torch.zeros(COPIED_BYTES[device.type] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    amounts = {"arithmetic": 2 * side**3, "bandwidth": 2 * source.numel()}
    calls = {"arithmetic": lambda: left @ right, "bandwidth": lambda: target.copy_(source)}
    forms = {kind: Form(call) for kind, call in calls.items()}
    times = clock.measure(forms, repeats=5, warmup=2)
    return {kind: amounts[kind] / summarize(times[kind])["median"] for kind in forms}


def count_flops(form: Form) -> float:
    """Operations of a call."""
    arguments = form.prepare()
    with FlopCounterMode(display=False) as counter:
        form.run(*arguments)
    return float(counter.get_total_flops())
