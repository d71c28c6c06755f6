"""Loading processes serve on when a scheduler signals every process of a job."""

import itertools
import multiprocessing
import signal
import subprocess

import pytest

from s4m_d2.data import StreamLoader

TIME_TO_END = 4.0  # seconds; PyTorch waits 5 for a worker before it sends SIGTERM itself


def as_it_is(record):
    return record


def no_seeds(position):
    return {}


@pytest.mark.parametrize(
    ("number", "method"),
    [
        (signal.SIGTERM, "fork"),
        (signal.SIGUSR1, "fork"),
        pytest.param(signal.SIGTERM, "forkserver", marks=pytest.mark.slow),
    ],
)
def test_workers_outlive_stop_signals_and_end_with_the_loader(number, method):
    records = [{"file_name": str(i)} for i in range(5)]
    loader = StreamLoader(
        records,
        as_it_is,
        itertools.cycle(range(5)),
        batch_size=1,
        num_workers=2,
        seeds=no_seeds,
        max_skipped=0,
    )
    loader.multiprocessing_context = method
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    names = [next(batches)[0]["file_name"] for _ in range(3)]
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)  # not the parent
    names += [next(batches)[0]["file_name"] for _ in range(40)]
    assert names == [str(i % 5) for i in range(43)]
    assert all(worker.is_alive() for worker in workers)

    for worker in workers:
        worker.terminate()  # by the training process, as PyTorch does in the end
        worker.join(TIME_TO_END)
        assert worker.exitcode == 0
