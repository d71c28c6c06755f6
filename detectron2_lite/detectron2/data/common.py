"""Data set wrappers between a list of records and the data loader."""

from __future__ import annotations

import copy as copy_module
import itertools
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch.utils import data

__all__ = ["AspectRatioGroupedDataset", "DatasetFromList", "MapDataset", "ToIterableDataset"]

logger = logging.getLogger(__name__)

_WARN_AFTER_RETRIES = 3
_FALLBACK_SEED = 42


class _PicklableFunction:
    """A callable that reaches worker processes even if it is a lambda or a closure."""

    def __init__(self, func: Callable):
        self._func = func._func if isinstance(func, _PicklableFunction) else func

    def __call__(self, *args, **kwargs):
        return self._func(*args, **kwargs)

    def __reduce__(self):
        return _restore_function, (cloudpickle.dumps(self._func),)


def _restore_function(buffer: bytes) -> _PicklableFunction:
    return _PicklableFunction(cloudpickle.loads(buffer))


class _MapIterableDataset(data.IterableDataset):
    """What :class:`MapDataset` becomes over an iterable data set."""

    def __init__(self, dataset: Iterable, map_func: Callable):
        self._dataset = dataset
        self._map_func = _PicklableFunction(map_func)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator:
        return (y for x in self._dataset if (y := self._map_func(x)) is not None)


class MapDataset(data.Dataset):
    """Apply ``map_func`` to every element.

    ``map_func`` returns None to refuse an element: a map-style data set then answers with
    another, randomly chosen one that is not known to be refused; an iterable one goes on.
    """

    def __new__(cls, dataset, map_func: Callable):
        if isinstance(dataset, data.IterableDataset):
            return _MapIterableDataset(dataset, map_func)
        return super().__new__(cls)

    def __init__(self, dataset: Sequence, map_func: Callable):
        self._dataset = dataset
        self._map_func = _PicklableFunction(map_func)
        self._rng = random.Random(_FALLBACK_SEED)
        self._fallback_candidates = set(range(len(dataset)))

    def __getnewargs__(self):
        return self._dataset, self._map_func

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        current = int(idx)
        for retry in itertools.count(1):
            mapped = self._map_func(self._dataset[current])
            if mapped is not None:
                self._fallback_candidates.add(current)
                return mapped
            self._fallback_candidates.discard(current)
            current = self._rng.sample(list(self._fallback_candidates), k=1)[0]
            if retry >= _WARN_AFTER_RETRIES:
                logger.warning(f"Failed to apply `_map_func` for idx: {idx}, retry count: {retry}")


class _SerializedList:
    """A read-only list that keeps its items pickled in one tensor.

    Worker processes share the tensor's memory; a list of Python objects would be copied into
    each of them as soon as its reference counts are touched.
    """

    def __init__(self, items: list):
        buffers = [pickle.dumps(x, protocol=pickle.HIGHEST_PROTOCOL) for x in items]
        self._ends = torch.from_numpy(np.cumsum([len(b) for b in buffers], dtype=np.int64))
        self._bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(buffers)), dtype=np.uint8))
        size = len(self._bytes) / 1024**2
        logger.info(f"Serialized {len(buffers)} elements into {size:.2f} MiB")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, idx: int) -> Any:
        start = 0 if idx == 0 else self._ends[idx - 1].item()
        return pickle.loads(memoryview(self._bytes[start : self._ends[idx].item()].numpy()))


class DatasetFromList(data.Dataset):
    """A list as a map-style data set.

    Args:
        lst: the records.
        copy: hand out deep copies, so that changing one leaves the list as it was.
        serialize: keep the records pickled (they are then copies in any case); a callable takes
            the list and returns its own list-like storage.
    """

    def __init__(self, lst: list, copy: bool = True, serialize: bool | Callable = True):
        if not (isinstance(serialize, bool) or callable(serialize)):
            raise TypeError(f"Unsupported type for argument `serialize`: {serialize}")
        self._copy = copy and serialize is False
        store = _SerializedList if serialize is True else serialize
        self._lst = store(lst) if store else lst

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        return copy_module.deepcopy(self._lst[idx]) if self._copy else self._lst[idx]


class ToIterableDataset(data.IterableDataset):
    """A map-style data set and a sampler as one iterable data set.

    The sampler runs in every worker process. With ``shard_sampler``, worker ``i`` of ``n`` keeps
    chunks ``i, i + n, i + 2n, ...`` of ``shard_chunk_size`` indices; without it, the sampler must
    differ between workers by itself.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        sampler: data.Sampler,
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ):
        assert not isinstance(dataset, data.IterableDataset), dataset
        assert isinstance(sampler, data.Sampler), sampler
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator:
        indices: Iterable[int] = self.sampler
        worker = data.get_worker_info()
        if self.shard_sampler and worker is not None and worker.num_workers > 1:
            indices = (
                idx
                for position, idx in enumerate(self.sampler)
                if position // self.shard_chunk_size % worker.num_workers == worker.id
            )
        for idx in indices:
            yield self.dataset[idx]


class AspectRatioGroupedDataset(data.IterableDataset):
    """Lists of ``batch_size`` records that are all wider than high, or all not.

    ``dataset`` yields dicts with "width" and "height"; incomplete batches are never yielded.
    """

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        self.dataset = dataset
        self.batch_size = batch_size
        self._buckets: dict[bool, list[dict]] = {True: [], False: []}

    def __iter__(self) -> Iterator[list[dict]]:
        for record in self.dataset:
            bucket = self._buckets[record["width"] > record["height"]]
            bucket.append(record)
            if len(bucket) == self.batch_size:
                batch = bucket[:]
                bucket.clear()  # before the yield: what follows it may never run
                yield batch
