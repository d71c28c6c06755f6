"""Interleaved timing, its statistics, and the memory of one call."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENT = "[memory]"  # of a trace of torch.profiler
CPU_IN_TRACE = 0  # "Device Type" of a memory event


@dataclass(frozen=True)
class Form:
    """One way to do a part.

    Attributes:
        run: what is timed; it gets what ``prepare`` returns.
        prepare: makes the arguments before each call; not timed.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple


@dataclass(frozen=True)
class Summary:
    """Seconds of repeated calls: the median and the quartiles around it."""

    median: float
    lower: float
    upper: float
    repeats: int


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles (linear interpolation) of at least one value."""
    lower, median, upper = (float(q) for q in np.percentile(values, [25, 50, 75]))
    return Summary(median, lower, upper, len(values))


class Clock:
    """Seconds on a device: the device has finished before a time is read.

    On the CPU with one thread it is the time of the process, which other programs do not stretch;
    otherwise, and always with ``wall``, that of the wall.
    """

    def __init__(self, device: torch.device, *, wall: bool = False) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1 and not wall
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
    forms: Mapping[str, Form], clock: Clock, *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each repeat of each form, taken in turns: A B, B A, A B, …"""
    names = list(forms)
    for _ in range(warmup):
        for name in names:
            clock.time(forms[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            times[name].append(clock.time(forms[name]))
    return times


def ratio(plain: Sequence[float], ours: Sequence[float]) -> Summary:
    """How many times as long the plain form takes; of the repeats that were taken in turns."""
    return summarize([a / b for a, b in zip(plain, ours, strict=True)])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what libraries write to stderr by themselves; Python's errors still rise."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(form: Form, device: torch.device) -> int:
    """Bytes that a call needs beyond what is held before it.

    On a GPU from CUDA's allocator; on the CPU the peak of the tensors' allocations that
    torch.profiler records, which leaves out NumPy's and the libraries' own.
    """
    arguments = form.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        form.run(*arguments)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        form.run(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return peak_of_trace(json.loads(path.read_text())["traceEvents"])


def peak_of_trace(events: Sequence[Mapping[str, Any]]) -> int:
    """The largest sum of the CPU's allocations, in bytes, in the order of their times."""
    memory = [event for event in events if event.get("name") == MEMORY_EVENT]
    memory = [e for e in memory if e["args"].get("Device Type") == CPU_IN_TRACE]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        held += int(event["args"]["Bytes"])
        peak = max(peak, held)
    return peak
