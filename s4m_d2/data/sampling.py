"""What both mappers share: the seeds of a sample's draws, and the keys that pass through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.utils.data import get_worker_info

_PASSED_KEYS = ("file_name", "image_id", "seeds", "stream_position")
_SEED_BITS = 63


@dataclass(frozen=True)
class AugmentSeeds:
    """Two independent seeds from one."""

    seed: int

    @property
    def geometry(self) -> int:
        return self.seed

    def color(self) -> np.random.Generator:
        """A new generator of the color distortion's draws."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(1,)))


class SampleSeeds:
    """The augmentation seed of each sample: the one its loader attached, or a fresh one.

    Args:
        rng: source of fresh seeds; None: the system's entropy. Each worker of a loader draws from
            a stream of its own.
    """

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self._rng = rng
        self._worker: int | None = None

    def of(self, record: dict) -> AugmentSeeds:
        if "seeds" in record:
            return AugmentSeeds(record["seeds"]["augment"])
        return AugmentSeeds(int(self._fresh().integers(2**_SEED_BITS)))

    def _fresh(self) -> np.random.Generator:
        worker = get_worker_info()
        if self._rng is None:
            return np.random.default_rng()
        if worker is not None and worker.id != self._worker:  # first sample in this worker
            self._worker = worker.id
            self._rng = np.random.default_rng([int(self._rng.integers(2**_SEED_BITS)), worker.id])
        return self._rng


def start_sample(record: dict, image: np.ndarray) -> dict:
    """A sample with the record's identity, the image's own (H, W), and the loader's keys."""
    sample = {key: record[key] for key in _PASSED_KEYS if key in record}
    sample["height"], sample["width"] = image.shape[:2]
    return sample
