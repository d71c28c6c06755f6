"""The order of samplers, loaders and their workers, against Detectron2's."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import (
    MapDataset,
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.samplers import (
    InferenceSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

RANKS = [(0, 1), (0, 3), (1, 3), (2, 3)]
WIDE = "WHHWWWHWHHW"  # the orientation of each record


def take(iterable, count):
    return list(itertools.islice(iter(iterable), count))


def be_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)


RECORDS = [
    {"image_id": i, "width": 20 if side == "W" else 10, "height": 15,
     "annotations": [{"category_id": c} for c in ([0] * 3 + [1] * 2 + [2] * (i % 4 == 0))[i % 3:]]}
    for i, side in enumerate(WIDE)
]  # fmt: skip


@pytest.mark.parametrize("rank, world_size", RANKS)
def test_training_streams(reference, monkeypatch, rank, world_size):
    be_rank(monkeypatch, rank, world_size)
    streams = {
        f"{size}/{seed}/{shuffle}": take(TrainingSampler(size, shuffle, seed), 30)
        for size, seed, shuffle in [(1, 0, True), (7, 3, True), (13, 42, True), (5, 1, False)]
    }
    reference(f"samplers/training/{rank}of{world_size}", streams)


@pytest.mark.parametrize("rank, world_size", RANKS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_repeat_factor_streams(reference, monkeypatch, rank, world_size, shuffle):
    be_rank(monkeypatch, rank, world_size)
    factors = torch.tensor([1.0, 1.5, 0.25, 3.0, 2.875, 1.0])
    sampler = RepeatFactorTrainingSampler(factors, shuffle=shuffle, seed=11)
    reference(f"samplers/repeat_factor/{shuffle}/{rank}of{world_size}", take(sampler, 40))


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_repeat_factors(reference, threshold):
    count = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    factors = [count(RECORDS, threshold), count(RECORDS, threshold, sqrt=False)]
    reference(f"samplers/repeat_factors/{threshold}", factors)


def test_inference_shares(reference, monkeypatch):
    shares = {}
    for size, world_size in [(1, 1), (1, 2), (7, 3), (8, 3), (9, 3), (500, 8)]:
        for rank in range(world_size):
            be_rank(monkeypatch, rank, world_size)
            indices = list(InferenceSampler(size))
            ends = [indices[0], indices[-1]] if indices else []
            shares[f"{size}/{rank}of{world_size}"] = [len(indices), *ends]
    reference("samplers/inference", shares)


def ids(batches):
    return [[sample["image_id"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_order_of_the_train_loader(reference, num_workers, grouping):
    loader = build_detection_train_loader(
        RECORDS,
        mapper=None,
        sampler=TrainingSampler(len(RECORDS), seed=5),
        total_batch_size=2,
        aspect_ratio_grouping=grouping,
        num_workers=num_workers,
    )
    reference(f"loader/order/{grouping}/{num_workers}", ids(take(loader, 20)))


class Draw:
    """Adds a number of each global generator to the record."""

    def __call__(self, record):
        draws = [random.random(), np.random.rand(), torch.rand(1).item()]
        return {**record, "draws": draws}


@pytest.mark.parametrize("grouping", [True, False])
def test_workers_draw_the_same_numbers(reference, grouping):
    """The seed of the loader decides what the workers draw, and which worker has which record."""
    loader = build_detection_train_loader(
        RECORDS,
        mapper=Draw(),
        sampler=TrainingSampler(len(RECORDS), seed=5),
        total_batch_size=2,
        aspect_ratio_grouping=grouping,
        num_workers=2,
        seed=9,
    )
    drawn = [[[s["image_id"], *s["draws"]] for s in batch] for batch in take(loader, 5)]
    reference(f"loader/worker_draws/{grouping}", drawn)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_takes_as_much_of_the_global_generator(reference, num_workers):
    torch.manual_seed(4)
    loader = build_detection_train_loader(
        RECORDS, mapper=Draw(), sampler=TrainingSampler(len(RECORDS), seed=5),
        total_batch_size=2, num_workers=num_workers,
    )  # fmt: skip
    batch = next(iter(loader))
    drawn = [sample["draws"][2] for sample in batch]
    reference(f"loader/global_generator/{num_workers}", [drawn, torch.rand(1).item()])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 3)])
def test_order_of_the_test_loader(reference, monkeypatch, num_workers, rank, world_size):
    be_rank(monkeypatch, rank, world_size)
    loader = build_detection_test_loader(
        RECORDS, mapper=None, batch_size=3, num_workers=num_workers
    )
    reference(f"loader/test/{rank}of{world_size}/{num_workers}", [len(loader), ids(loader)])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("grouping, drop_last", [(True, True), (False, True), (False, False)])
def test_a_finite_sampler_ends_the_loader(reference, num_workers, grouping, drop_last):
    sampler = torch.utils.data.SequentialSampler(RECORDS)
    loader = build_batch_data_loader(
        MapDataset(RECORDS, Draw()), sampler, 2,
        aspect_ratio_grouping=grouping, drop_last=drop_last, num_workers=num_workers,
    )  # fmt: skip
    reference(f"loader/finite/{grouping}/{drop_last}/{num_workers}", ids(loader))


def test_substitutes_of_refused_elements(reference):
    """Elements that were refused once may come back as substitutes after they passed."""
    refused = {2, 3, 5, 8}
    dataset = MapDataset(list(range(12)), lambda x: None if x in refused else x)
    first = [dataset[i] for i in [0, 2, 3, 3, 5, 11, 8, 2]]
    refused -= {3, 8}
    second = [dataset[i] for i in [3, 8, 2, 5, 2, 5, 2, 5, 2, 5, 2, 5, 2, 5]]
    reference("loader/substitutes", [first, second])
