"""Index streams."""

import itertools
import math

import pytest
import torch
from detectron2.data.samplers import (
    InferenceSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm


def _take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def test_training_stream_is_one_permutation_after_the_other_from_one_generator():
    generator = torch.Generator().manual_seed(7)
    expected = [i for _ in range(3) for i in torch.randperm(5, generator=generator).tolist()]
    assert _take(TrainingSampler(5, seed=7), 15) == expected
    assert _take(TrainingSampler(3, shuffle=False, seed=7), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_each_iteration_over_a_sampler_starts_anew():
    sampler = TrainingSampler(10, seed=1)
    assert _take(sampler, 25) == _take(sampler, 25)


def test_ranks_share_one_stream(monkeypatch):
    whole = _take(TrainingSampler(7, seed=3), 30)
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        assert _take(TrainingSampler(7, seed=3), 10) == whole[rank::3]


@pytest.mark.parametrize("size, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_training_sampler_refuses_sizes_that_are_no_positive_int(size, error):
    with pytest.raises(error):
        TrainingSampler(size)


# Class 0 is in 4 of 4 images, class 1 in 2, class 2 in 1; the last image is empty but for class 0.
RECORDS = [
    {"annotations": [{"category_id": c} for c in classes]}
    for classes in ([0, 0, 1], [0, 1, 2], [0], [0])
]


@pytest.mark.parametrize(
    "threshold, sqrt, expected",
    [
        (0.5, True, [1, math.sqrt(2), 1, 1]),
        (0.5, False, [1, 2, 1, 1]),
        (10, True, [math.sqrt(20), math.sqrt(40), math.sqrt(10), math.sqrt(10)]),
        (0.1, True, [1, 1, 1, 1]),
    ],
)
def test_repeat_factor_of_an_image_is_that_of_its_rarest_class(threshold, sqrt, expected):
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        RECORDS, threshold, sqrt=sqrt
    )
    assert factors.dtype == torch.float32
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float32))


def test_an_image_without_annotations_is_not_repeated():
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        [{"annotations": []}, {"annotations": [{"category_id": 3}]}], 2.0
    )
    assert factors.tolist() == [1.0, 2.0]


def test_whole_repeat_factors_fix_the_epoch():
    sampler = RepeatFactorTrainingSampler(torch.tensor([1.0, 3.0, 0.0, 2.0]), seed=0)
    stream = _take(sampler, 12)
    assert sorted(stream[:6]) == sorted(stream[6:]) == [0, 1, 1, 1, 3, 3]
    ordered = RepeatFactorTrainingSampler(torch.tensor([2.0, 1.0]), shuffle=False, seed=0)
    assert _take(ordered, 6) == [0, 0, 1, 0, 0, 1]


def test_fractional_repeat_factors_are_rounded_by_the_generator():
    factors = torch.tensor([1.5, 1.25, 2.75])
    generator = torch.Generator().manual_seed(11)
    expected = []
    for _ in range(4):
        up = torch.rand(3, generator=generator) < factors - factors.floor()
        epoch = [i for i in range(3) for _ in range(int(factors[i]) + int(up[i]))]
        order = torch.randperm(len(epoch), generator=generator)
        expected += [epoch[i] for i in order]
    assert _take(RepeatFactorTrainingSampler(factors, seed=11), len(expected)) == expected


@pytest.mark.parametrize("size, world_size", [(1, 1), (10, 3), (2, 4), (12, 4)])
def test_inference_covers_every_index_once_in_order(monkeypatch, size, world_size):
    monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        sampler = InferenceSampler(size)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert list(itertools.chain(*shares)) == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
