"""The loader of an endless stream of samples, which can start at any position."""

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import cv2
import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from detectron2.utils.registry import Registry
from torch.utils.data import DataLoader, Dataset

from s4m_d2.errors import DatasetError, S4MError

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
"""Mappers by INPUT.DATASET_MAPPER_NAME and S4M.UNLABELED_MAPPER: ``(cfg, is_train) -> mapper``."""

_STOPS = (
    {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} if hasattr(signal, "sigtimedwait") else set()
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Samples(Dataset):
    """Samples, or errors to raise, by (index of the record, position in the stream)."""

    records: DatasetFromList
    mapper: Callable[[dict], dict]
    seeds: Callable[[int], dict[str, int]]
    max_skipped: int

    def __getitem__(self, item: tuple[int, int]) -> dict | S4MError:
        first, position = item
        drawn = {"seeds": self.seeds(position), "stream_position": position}
        skips = getattr(self.mapper, "skip_unreadable", False)
        skipped: dict[str, str] = {}
        for index in range(first, first + len(self.records)):  # each once: tiles share an image
            record = {**self.records[index % len(self.records)], **drawn}
            try:
                sample = self.mapper(record)
                return {**sample, "skipped_images": skipped} if skipped else sample
            except S4MError as error:
                if not (skips and isinstance(error, DatasetError)):
                    return error  # a worker would change its type and message
                skipped[record["file_name"]] = str(error)
            if len(skipped) > self.max_skipped:
                break
        return _too_many(skipped)


@dataclass(frozen=True)
class _Positions:
    """(index, position) pairs of this process from a sampler, from ``start`` on."""

    sampler: Iterable[int]
    start: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        indices = itertools.islice(self.sampler, self.start, None)
        for step, index in enumerate(indices, start=self.start):
            yield index, step * world_size + rank


class StreamLoader(DataLoader):
    """The endless stream of one process; its samples do not depend on the number of workers.

    A sample's position is its index in the global stream: ``k * world_size + rank`` for the k-th
    one of this process. If the mapper has ``skip_unreadable``, an image that raises DatasetError is
    replaced by that of the next record, unless there are too many; errors of other mappers end the
    stream. Each ``iter`` starts at ``start_position``.

    Args:
        mapper: Detectron2 record with "seeds" and "stream_position" -> sample.
        sampler: Detectron2's: yields this process' share of the indices, always the same.
        start_position: samples of this process already consumed; they are not loaded again.
        seeds: position -> the sample's seeds by purpose.
        max_skipped: maximum number of different unusable images.
        options: of DataLoader: ``batch_size`` (of this process), ``num_workers``, ``pin_memory``.

    Attributes:
        skipped_images: unusable files of this process so far, in order, and the reasons.
    """

    def __init__(
        self,
        dataset_dicts: Sequence[dict],
        mapper: Callable[[dict], dict],
        sampler: Iterable[int],
        *,
        start_position: int = 0,
        seeds: Callable[[int], dict[str, int]],
        max_skipped: int,
        **options: Any,
    ) -> None:
        super().__init__(
            _Samples(DatasetFromList(list(dataset_dicts), copy=False), mapper, seeds, max_skipped),
            sampler=_Positions(sampler, start_position),
            collate_fn=list,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else starting workers draws from the global one
            **options,
        )
        self._max_skipped = max_skipped
        self.skipped_images: dict[str, str] = {}

    def __iter__(self) -> Iterator[list[dict]]:  # type: ignore[override]  # no more is promised
        for batch in self._start():
            for sample in batch:
                if isinstance(sample, S4MError):
                    raise sample
                for file_name, reason in sample.get("skipped_images", {}).items():
                    if file_name not in self.skipped_images:
                        self.skipped_images[file_name] = reason
                        count = len(self.skipped_images)
                        logger.warning("Skipped an unlabeled image (%d so far): %s", count, reason)
            if len(self.skipped_images) > self._max_skipped:
                raise _too_many(self.skipped_images)
            yield batch

    def _start(self) -> Iterator[list[dict]]:
        """Start the workers with stop signals masked, also for threads that libraries start on
        import, which would otherwise receive them."""
        if not _STOPS:
            return super().__iter__()
        resource_tracker.ensure_running()  # which unblocks SIGTERM when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _too_many(skipped: dict[str, str]) -> DatasetError:
    return DatasetError(
        f"{len(skipped)} unlabeled images cannot be used: more than S4M.MAX_SKIPPED_IMAGES allows, "
        "or all there are. Replace them, or raise the limit. The last one: "
        f"{list(skipped.values())[-1]}"
    )


def _start_worker(worker_id: int) -> None:
    """Ignore stop signals that the training process did not send: schedulers and Ctrl-C send them
    to every process of a job, but the last iteration still needs the worker's batches. If the
    training process is dead, exit; PyTorch does not notice if it died while the worker started."""
    cv2.setNumThreads(0)  # one thread for each worker; torch limits itself
    if not _STOPS:
        return
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    training = parent.pid  # not getppid(): there may be a fork server
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # a fork server's processes have its mask

    def take() -> None:
        while parent.is_alive():
            info = signal.sigtimedwait(_STOPS, 5.0)
            if info and info.si_signo == signal.SIGTERM and info.si_pid == training:
                break
        os._exit(0)

    threading.Thread(target=take, daemon=True).start()
