"""How fast one loading process makes samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import cv2


def images_per_second(
    mapper: Callable[[dict], dict], records: Sequence[dict], count: int, *, start: int = 0
) -> float:
    """Samples of a mapper per second of one core, as a worker of the loader makes them.

    Args:
        mapper: of the labeled or the unlabeled stream.
        records: Detectron2's, taken in turn.
        count: samples to make, at least 1.
        start: seed of the first sample; each has the seed after the one before it, so that two
            mappers can be compared on the same draws.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        begin = time.process_time()
        for seed in range(start, start + count):
            mapper({**records[seed % len(records)], "seeds": {"augment": seed}})
        return count / (time.process_time() - begin)
    finally:
        cv2.setNumThreads(threads)
