"""Data set wrappers between a list of records and the data loader."""

from __future__ import annotations

import copy as copy_module
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data

__all__ = ["AspectRatioGroupedDataset", "DatasetFromList", "MapDataset"]

_FALLBACK_SEED = 42


class MapDataset(data.Dataset):
    """Apply ``map_func`` to every element; where it returns None, the answer is another element,
    drawn from those for which it last did not.
    """

    def __init__(self, dataset: Sequence, map_func: Callable):
        self._dataset, self._map_func = dataset, map_func
        self._rng = random.Random(_FALLBACK_SEED)
        self._candidates = set(range(len(dataset)))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, idx: int) -> Any:
        current = int(idx)
        while (mapped := self._map_func(self._dataset[current])) is None:
            self._candidates.discard(current)
            current = self._rng.choice(list(self._candidates))
        self._candidates.add(current)
        return mapped


class _SerializedList:
    """A read-only list, pickled into one tensor: worker processes share its memory, where a list
    of objects would be copied into each of them by the change of its reference counts.
    """

    def __init__(self, items: list):
        buffers = [pickle.dumps(x, protocol=pickle.HIGHEST_PROTOCOL) for x in items]
        self._ends = torch.from_numpy(np.cumsum([len(b) for b in buffers], dtype=np.int64))
        self._bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(buffers)), dtype=np.uint8))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, idx: int) -> Any:
        start = 0 if idx == 0 else self._ends[idx - 1].item()
        return pickle.loads(memoryview(self._bytes[start : self._ends[idx].item()].numpy()))


class DatasetFromList(data.Dataset):
    """A list as a map-style data set.

    copy: hand out deep copies. serialize: keep the records pickled (they are copies in any case).
    """

    def __init__(self, lst: list, copy: bool = True, serialize: bool = True):
        self._lst = _SerializedList(lst) if serialize else lst
        self._copy = copy and not serialize

    def __len__(self) -> int:
        return len(self._lst)

    def __getitem__(self, idx: int) -> Any:
        return copy_module.deepcopy(self._lst[idx]) if self._copy else self._lst[idx]


class AspectRatioGroupedDataset(data.IterableDataset):
    """Lists of ``batch_size`` records ("width", "height", ...), all wider than high or all not."""

    def __init__(self, dataset: Iterable[dict], batch_size: int):
        self.dataset, self.batch_size = dataset, batch_size
        self._buckets: dict[bool, list[dict]] = {True: [], False: []}

    def __iter__(self) -> Iterator[list[dict]]:
        for record in self.dataset:
            bucket = self._buckets[record["width"] > record["height"]]
            bucket.append(record)
            if len(bucket) == self.batch_size:
                batch = bucket[:]
                bucket.clear()  # before the yield: what follows it may never run
                yield batch
