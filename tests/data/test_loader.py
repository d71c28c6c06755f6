"""The stream of samples: seeds, workers, ranks, damaged images, signals, page-locked memory."""

import functools
import itertools
import logging
import multiprocessing
import signal
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from data_scenes import truncate
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import TrainingSampler
from test_mappers import arp_mapper, labeled_mapper
from test_transforms import config

from s4m_d2.data import StreamLoader
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.engine.training.build import build_unlabeled_loader
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.tiling import Tiling

BATCH = 3


def stream(name, mapper, *, batches, workers=0, start=0, max_skipped=5, pin_memory=False):
    records = DatasetCatalog.get(name)
    loader = StreamLoader(
        records,
        mapper,
        TrainingSampler(len(records), seed=11),
        batch_size=BATCH,
        num_workers=workers,
        start_position=start,
        seeds=functools.partial(sample_seeds, 5, "stream"),
        max_skipped=max_skipped,
        pin_memory=pin_memory,
    )
    samples = [s for batch in itertools.islice(loader, batches) for s in batch]
    return samples, loader


def fingerprint(samples):
    """Everything that a sample's draws and origin decide."""
    keys = ("file_name", "stream_position", "seeds", "skipped_images", "height", "width")
    found = []
    for sample in samples:
        tensors = [sample[key] for key in ("image", "image_weak") if key in sample]
        if "instances" in sample:
            tensors.append(sample["instances"].gt_masks.tensor)
        pixels = [tensor.numpy().tobytes() for tensor in tensors]
        found.append((*map(sample.get, keys), *pixels))
    return found


@pytest.fixture(params=["labeled", "unlabeled"])
def kind(request, data_root):
    if request.param == "labeled":
        return "toyscapes_train", labeled_mapper(COLOR_AUG_SSD=True)
    return "toyscapes_train_unlabeled", arp_mapper(COLOR_AUG_SSD=True)


def test_the_number_of_workers_changes_nothing_and_global_generators_are_left_alone(kind):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    expected = fingerprint(stream(*kind, batches=9)[0])
    assert len({name for name, *_ in expected}) == 20
    for workers in (1, 2):
        assert fingerprint(stream(*kind, batches=9, workers=workers)[0]) == expected
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_a_stream_that_starts_later_is_the_tail_of_the_whole(kind):
    whole = fingerprint(stream(*kind, batches=10)[0])
    assert fingerprint(stream(*kind, batches=3, start=7 * BATCH)[0]) == whole[7 * BATCH :]
    seen = []
    stream(kind[0], lambda record: seen.append(record) or record, batches=1, start=300)
    assert [record["stream_position"] for record in seen] == [300, 301, 302]  # none before


def test_ranks_share_one_stream(data_root):
    def names_and_positions(rank, world_size, batches):
        with (
            mock.patch("detectron2.utils.comm.get_rank", return_value=rank),
            mock.patch("detectron2.utils.comm.get_world_size", return_value=world_size),
        ):
            samples, _ = stream("toyscapes_train_unlabeled", dict, batches=batches)
        return [(s["stream_position"], s["file_name"]) for s in samples]

    whole = names_and_positions(0, 1, 8)
    parts = names_and_positions(0, 2, 4) + names_and_positions(1, 2, 4)
    assert sorted(parts) == whole


def damage(data_root, count):
    """Truncate the first images of the training set; returns their paths."""
    paths = sorted(Path(data_root).rglob("leftImg8bit/train/*/*.png"))[:count]
    for path in paths:
        truncate(path)
    return [str(path) for path in paths]


def test_damaged_unlabeled_images_are_skipped_counted_and_logged(data_root, caplog):
    damaged = damage(data_root, 3)
    mapper = arp_mapper()
    with caplog.at_level(logging.WARNING, "s4m_d2.data.build"):
        samples, loader = stream("toyscapes_train_unlabeled", mapper, batches=14)
    assert len(samples) == 14 * BATCH  # every image twice
    assert not set(damaged) & {sample["file_name"] for sample in samples}
    assert sorted(loader.skipped_images) == damaged  # each counted once
    assert len(caplog.records) == 3 and damaged[0] in caplog.text
    assert {n for s in samples for n in s.get("skipped_images", ())} == set(damaged)
    expected = fingerprint(samples)
    for workers in (1, 2):
        others = stream("toyscapes_train_unlabeled", mapper, batches=14, workers=workers)[0]
        assert fingerprint(others) == expected
    tail = stream("toyscapes_train_unlabeled", mapper, batches=4, start=10 * BATCH)[0]
    assert fingerprint(tail) == expected[10 * BATCH :]


def test_too_many_damaged_unlabeled_images_end_the_stream(data_root):
    for count, allowed, workers in ((4, 3, 0), (4, 3, 1), (20, 100, 0)):  # 20: all that there are
        damage(data_root, count)
        options = {"batches": 14, "max_skipped": allowed, "workers": workers}
        with pytest.raises(DatasetError, match="MAX_SKIPPED_IMAGES"):
            stream("toyscapes_train_unlabeled", arp_mapper(), **options)


def test_tiles_of_damaged_unlabeled_images_end_the_stream_too(data_root):
    damage(data_root, 20)
    records = Tiling(40).records(DatasetCatalog.get("toyscapes_train_unlabeled"))
    assert len(records) > 20
    with mock.patch.object(DatasetCatalog, "get", return_value=records):
        with pytest.raises(DatasetError, match="^20 unlabeled images"):
            stream("tiles", arp_mapper(), batches=1, max_skipped=100)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_labeled_images_and_others_end_the_stream_unchanged(data_root, workers):
    (damaged,) = damage(data_root, 1)
    with pytest.raises(DatasetError) as error:
        stream("toyscapes_train", labeled_mapper(), batches=14, workers=workers)
    assert str(error.value).startswith(damaged) and "Traceback" not in str(error.value)
    for kind_of_error in (ConfigError, ZeroDivisionError):
        mapper = mock.Mock(side_effect=kind_of_error("wrong key"), skip_unreadable=True)
        with pytest.raises(kind_of_error, match="wrong key"):
            stream("toyscapes_train_unlabeled", mapper, batches=1, workers=workers)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_images_for_a_gpu_lie_in_page_locked_memory(data_root, workers):
    name, mapper = "toyscapes_train", labeled_mapper()
    samples, _ = stream(name, mapper, batches=2, workers=workers, pin_memory=True)
    assert all(sample["image"].is_pinned() for sample in samples)
    assert all(sample["instances"].gt_masks.tensor.is_pinned() for sample in samples)
    plain, _ = stream(name, mapper, batches=2)
    assert fingerprint(samples) == fingerprint(plain)


def test_page_locked_memory_is_for_gpus_alone(data_root):
    for device, pinned in (("cuda:1", True), ("cpu", False)):
        cfg = config(FORMAT="RGB")
        cfg.DATASETS.UNLABELED = ("toyscapes_train_unlabeled",)
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.MODEL.DEVICE = device
        assert build_unlabeled_loader(cfg).pin_memory == pinned


def no_seeds(position):
    return {}


SLOW = pytest.param(signal.SIGTERM, "forkserver", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "method"), [(signal.SIGTERM, "fork"), (signal.SIGUSR1, "fork"), SLOW]
)
def test_workers_outlive_stop_signals_and_end_with_the_loader(number, method):
    records = [{"file_name": str(i)} for i in range(5)]
    sampler, options = itertools.cycle(range(5)), {"batch_size": 1, "num_workers": 2}
    loader = StreamLoader(records, dict, sampler, seeds=no_seeds, max_skipped=0, **options)
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
        worker.join(4.0)  # PyTorch waits 5 seconds before it sends SIGTERM itself
        assert worker.exitcode == 0
