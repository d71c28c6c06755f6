"""Images that several processes work on, each with one thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import cv2
import torch

from s4m_d2.errors import WorkerError
from s4m_d2.sepl.enhance_image import Enhancer, ImageFiles, Outcome


def outcomes(
    enhancer: Enhancer, jobs: Sequence[ImageFiles], workers: int
) -> Generator[Outcome, None, None]:
    """What becomes of each image, in the order in which they are finished.

    An image's result does not depend on the number of processes. When the iteration ends early,
    images that are being worked on are finished first.

    Args:
        enhancer: does the work.
        jobs: the images.
        workers: processes; 1: this one.

    Raises:
        S4MError: as Enhancer.enhance.
        WorkerError: a process has ended by itself.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        with _one_thread():
            yield from map(enhancer.enhance, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(enhancer.enhance, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            f"one of the {workers} processes has ended by itself: was it killed, or out of "
            "memory? What is finished is kept; start again, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave interrupts to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed does not tell its workers, which would wait for it forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As many threads as a worker has: their number moves sums by rounding."""
    threads, opencv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(opencv_threads)
