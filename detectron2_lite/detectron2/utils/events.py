"""Scalars of a training run: one storage, several writers."""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
from collections import defaultdict
from functools import cached_property
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from fvcore.common.history_buffer import HistoryBuffer

_BYTES_PER_MB = 2**20
_ETA_WINDOW = 1000  # iteration times whose median predicts the time left

_storage_stack: list[EventStorage] = []


def get_event_storage() -> EventStorage:
    """The innermost storage in use. Raises AssertionError outside ``with EventStorage()``."""
    assert _storage_stack, "get_event_storage() works only inside 'with EventStorage(...)'"
    return _storage_stack[-1]


class EventStorage:
    """What happened, by name and iteration; a context manager."""

    def __init__(self, start_iter: int = 0):
        self.iter = start_iter  # a trainer keeps it equal to its own
        self._history: dict[str, HistoryBuffer] = defaultdict(HistoryBuffer)
        self._smoothing_hints: dict[str, bool] = {}
        self._vis_data: list[tuple[str, Any, int]] = []

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        """Record an RGB picture (3, H, W), uint8 in 0..255 or float in [0, 1], for TensorBoard."""
        self._vis_data.append((img_name, img_tensor, self.iter))

    def clear_images(self) -> None:
        """Forget all pictures: a writer has them."""
        self._vis_data = []

    def put_scalar(
        self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        """Record ``float(value)`` for ``cur_iter``, by default the current iteration. With the
        hint, the same in every call for a name, writers show a median over a window."""
        self._history[name].update(float(value), self.iter if cur_iter is None else cur_iter)
        hint = self._smoothing_hints.setdefault(name, smoothing_hint)
        assert hint == smoothing_hint, f"scalar {name} was put with another smoothing_hint before"

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **kwargs: Any
    ) -> None:
        """Record several scalars, given by keyword."""
        for name, value in kwargs.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def history(self, name: str) -> HistoryBuffer:
        """All values of a scalar. Raises KeyError for an unknown name."""
        if name not in self._history:
            raise KeyError(f"No history metric available for {name}!")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        return self._history

    def latest(self) -> dict[str, tuple[float, int]]:
        """name -> (latest value, its iteration)"""
        return {name: history.values()[-1] for name, history in self._history.items()}

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Like ``latest``, but scalars with the hint are medians over ``window_size`` iterations
        (not values) up to their latest one."""
        return {
            name: (self._smoothed(name, window_size) if self._smoothing_hints[name] else value, it)
            for name, (value, it) in self.latest().items()
        }

    def _smoothed(self, name: str, window_size: int) -> float:
        return self._history[name].median(self.count_samples(name, window_size))

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Number of values recorded in the ``window_size`` iterations up to the latest one."""
        values = self._history[name].values()
        first = values[-1][1] - window_size
        recent = itertools.takewhile(lambda item: item[1] > first, reversed(values))
        return sum(1 for _ in recent)

    def __enter__(self) -> EventStorage:
        _storage_stack.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert _storage_stack[-1] is self, "event storages must close in reverse order"
        _storage_stack.pop()


class EventWriter:
    """Takes events from the current storage and puts them somewhere."""

    def write(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class _ScalarWriter(EventWriter):
    def __init__(self, window_size: int):
        self._window_size = window_size
        self._last_write = -1

    def _new_scalars(self) -> dict[str, tuple[float, int]]:
        """name -> (value, iteration) of what came after the last call."""
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = {name: item for name, item in latest.items() if item[1] > self._last_write}
        self._last_write = max((item[1] for item in new.values()), default=self._last_write)
        return new


class JSONWriter(_ScalarWriter):
    """Append scalars to a file, one JSON object with an "iteration" key per line."""

    def __init__(self, json_file: str, window_size: int = 20):
        super().__init__(window_size)
        self._file = PathManager.open(json_file, "a")

    def write(self) -> None:
        lines: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in self._new_scalars().items():
            lines.setdefault(iteration, {"iteration": iteration})[name] = value
        for scalars in lines.values():
            self._file.write(json.dumps(scalars, sort_keys=True) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorboardXWriter(_ScalarWriter):
    """Write scalars and pictures as TensorBoard events; ``kwargs`` go to ``SummaryWriter``."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any):
        super().__init__(window_size)
        self._writer_args = {"log_dir": log_dir, **kwargs}

    @cached_property
    def _writer(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so on first use

        return SummaryWriter(**self._writer_args)

    def write(self) -> None:
        for name, (value, iteration) in self._new_scalars().items():
            self._writer.add_scalar(name, value, iteration)
        storage = get_event_storage()
        for picture in storage._vis_data:
            self._writer.add_image(*picture)
        storage.clear_images()

    def close(self) -> None:
        if "_writer" in self.__dict__:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Log a line with the time left (if ``max_iter`` is given), losses, ``[metric]`` scalars,
    times, learning rate and GPU memory."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20):
        self.logger = logging.getLogger(__name__)
        self._max_iter, self._window_size = max_iter, window_size

    def write(self) -> None:
        storage = get_event_storage()
        if storage.iter == self._max_iter:
            return  # training is over: nothing new about its progress
        histories, parts = storage.histories(), [f"iter: {storage.iter}"]
        if self._max_iter is not None and "time" in histories:
            time_left = histories["time"].median(_ETA_WINDOW) * (self._max_iter - storage.iter - 1)
            storage.put_scalar("eta_seconds", time_left, smoothing_hint=False)
            parts.insert(0, f"eta: {datetime.timedelta(seconds=int(time_left))}")
        for keyword in ("loss", "[metric]"):
            for name in [name for name in histories if keyword in name]:
                parts.append(f"{name}: {storage._smoothed(name, self._window_size):.4g}")
        for name in [name for name in ("time", "data_time") if name in histories]:
            window = storage.count_samples(name, self._window_size)
            parts.append(f"{name}: {histories[name].avg(window):.4f}")
            parts.append(f"last_{name}: {histories[name].latest():.4f}")
        parts.append(f"lr: {histories['lr'].latest():.5g}" if "lr" in histories else "lr: N/A")
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / _BYTES_PER_MB:.0f}M")
        self.logger.info(" " + "  ".join(parts))
