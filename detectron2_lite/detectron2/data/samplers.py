"""Index streams for training and inference, split over the processes of a job."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator

import torch
from detectron2.utils import comm
from torch.utils.data.sampler import Sampler

__all__ = ["InferenceSampler", "RepeatFactorTrainingSampler", "TrainingSampler"]

logger = logging.getLogger(__name__)


class _InfiniteSampler(Sampler):
    """An endless stream of epochs, of which rank ``r`` of ``n`` takes elements ``r, r + n, ...``;
    ``seed`` must be the same in all processes, None draws a shared one.
    """

    def __init__(self, shuffle: bool, seed: int | None):
        self._shuffle = shuffle
        self._seed = int(comm.shared_random_seed() if seed is None else seed)
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        raise NotImplementedError

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            indices = self._epoch(generator)
            if self._shuffle:
                indices = indices[torch.randperm(len(indices), generator=generator)]
            yield from indices.tolist()

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)


class TrainingSampler(_InfiniteSampler):
    """``shuffle(range(size)) + shuffle(range(size)) + ...``, endless."""

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None):
        if not isinstance(size, int):
            raise TypeError(f"TrainingSampler(size=) expects an int. Got type {type(size)}.")
        if size <= 0:
            raise ValueError(f"TrainingSampler(size=) expects a positive int. Got {size}.")
        super().__init__(shuffle, seed)
        self._size = size

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        return torch.arange(self._size)


class RepeatFactorTrainingSampler(_InfiniteSampler):
    """Image ``i`` on average ``repeat_factors[i]`` times an epoch, (N,) float; the fractional
    part is rounded at random, anew in each epoch.
    """

    def __init__(
        self, repeat_factors: torch.Tensor, *, shuffle: bool = True, seed: int | None = None
    ):
        super().__init__(shuffle, seed)
        self._int_part = torch.trunc(repeat_factors)
        self._frac_part = repeat_factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: list[dict], repeat_thresh: float, sqrt: bool = True
    ) -> torch.Tensor:
        """Factors that favor images with rare categories (LVIS, arXiv 1908.03195, B.2).

        A category in a share ``f`` of the images has factor ``max(1, sqrt(repeat_thresh / f))``
        (no root if ``sqrt`` is False); an image has the largest of its categories', or 1.
        """
        categories = [{a["category_id"] for a in d["annotations"]} for d in dataset_dicts]
        counts = Counter(itertools.chain.from_iterable(categories))
        factors = {}
        for category, count in sorted(counts.items()):
            frequency = count / len(dataset_dicts)
            ratio = repeat_thresh / frequency
            factors[category] = max(1.0, math.sqrt(ratio) if sqrt else ratio)
            logger.info(f"Cat ID {category}: freq={frequency:.2f}, rep={factors[category]:.2f}")
        per_image = [max((factors[c] for c in cats), default=1.0) for cats in categories]
        return torch.tensor(per_image, dtype=torch.float32)

    def _epoch(self, generator: torch.Generator) -> torch.Tensor:
        extra = torch.rand(len(self._frac_part), generator=generator) < self._frac_part
        repeats = (self._int_part + extra.float()).long()
        return torch.repeat_interleave(torch.arange(len(repeats)), repeats)


class InferenceSampler(Sampler):
    """Every index exactly once over all processes, in contiguous shares of nearly equal length."""

    def __init__(self, size: int):
        assert size > 0, f"InferenceSampler(size=) expects a positive int. Got {size}."
        rank = comm.get_rank()
        share, longer = divmod(size, comm.get_world_size())  # the first `longer` get one more
        begin = rank * share + min(rank, longer)
        self._local_indices = range(begin, begin + share + (rank < longer))

    def __iter__(self) -> Iterator[int]:
        return iter(self._local_indices)

    def __len__(self) -> int:
        return len(self._local_indices)
