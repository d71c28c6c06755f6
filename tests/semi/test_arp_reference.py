"""ARP against a literal reference: the method's rules, pixel by pixel, in double precision."""

from __future__ import annotations

import copy
import math
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from seeds import generators, seeded

from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError
from s4m_d2.semi.arp import ARP
from s4m_d2.structures import PseudoLabels

ON_AN_EDGE = 1e-4  # px; nearer to the edge of a source pixel, rounding may choose either side


class Instance(NamedTuple):
    label: int
    score: float
    quality: float
    mask: np.ndarray
    doubts: np.ndarray


class Placed(NamedTuple):
    """base = scale * source + (dx, dy), continuous pixels."""

    instance: Instance
    scale: float
    dx: float
    dy: float


class Result(NamedTuple):
    """What one image becomes; ``edge`` is the least distance of a read to a source pixel's edge."""

    image: np.ndarray
    instances: list[Instance]
    edge: float


def arp_literally(images, labels, generators, min_area, scale_range):
    """None for an image that nothing is pasted onto. ``scale_range`` None: static placement."""
    arrays = [image.double().numpy() for image in images]
    instances = [instances_of(label) for label in labels]
    results: list[Result | None] = [None] * len(images)
    for pair in draw_pairs(len(images), generators[0] if generators else None):
        for source, base in (pair, pair[::-1]):
            large = [i for i in instances[source] if count_pixels(i.mask) >= min_area]
            if not large:
                continue
            if scale_range is None:
                placed = [Placed(instance, 1.0, 0.0, 0.0) for instance in large]
            else:
                size = arrays[base].shape[1:]
                placed = place_randomly(large, size, scale_range, generators[base])
            results[base] = paste(arrays[source], placed, arrays[base], instances[base])
    return results


def draw_pairs(batch, generator):
    if batch < 2:
        return []
    order = torch.randperm(batch, generator=generator).tolist()
    return [(order[2 * pair], order[2 * pair + 1]) for pair in range(max(1, batch // 4))]


def place_randomly(large, size, scale_range, generator):
    draws = torch.rand((len(large), 3), generator=generator).tolist()
    placed = []
    for instance, (of_scale, of_x, of_y) in zip(large, draws, strict=True):
        height, width = instance.mask.shape
        inside = [(x, y) for y in range(height) for x in range(width) if instance.mask[y, x]]
        left, right = min(x for x, _ in inside), max(x for x, _ in inside) + 1
        top, bottom = min(y for _, y in inside), max(y for _, y in inside) + 1
        scale = scale_range[0] + (scale_range[1] - scale_range[0]) * of_scale
        new_left = of_x * (size[1] - scale * (right - left))
        new_top = of_y * (size[0] - scale * (bottom - top))
        placed.append(Placed(instance, scale, new_left - scale * left, new_top - scale * top))
    return placed


def paste(source, placed, base, own):
    _, height, width = base.shape
    image, edge = base.copy(), math.inf
    merged = own + [place.instance for place in placed]
    masks = [np.zeros((height, width), dtype=bool) for _ in merged]
    doubts = [np.zeros((height, width), dtype=np.uint8) for _ in merged]
    for y, x in product(range(height), range(width)):
        owner = None
        for index, instance in enumerate(own):
            doubts[index][y, x] = instance.doubts[y, x]
            if instance.mask[y, x]:
                owner = index
        for index, place in enumerate(placed, start=len(own)):
            source_x = (x + 0.5 - place.dx) / place.scale
            source_y = (y + 0.5 - place.dy) / place.scale
            edge = min(edge, *(abs(value - round(value)) for value in (source_x, source_y)))
            if covers(place.instance.mask, source_x, source_y):
                owner = index
                image[:, y, x] = bilinear(source, source_x, source_y)
                doubts[index][y, x] = place.instance.doubts[
                    math.floor(source_y), math.floor(source_x)
                ]
                for of_own in doubts[: len(own)]:
                    of_own[y, x] = 0  # nothing is doubted where pasting decided
        if owner is not None:
            masks[owner][y, x] = True
    kept = [
        instance._replace(mask=mask, doubts=its)
        for instance, mask, its in zip(merged, masks, doubts, strict=True)
        if count_pixels(mask)
    ]
    return Result(image, kept, edge)


def covers(mask, x, y):
    height, width = mask.shape
    return 0 <= x < width and 0 <= y < height and bool(mask[math.floor(y), math.floor(x)])


def bilinear(image, x, y):
    """Pixel (i, j) has its center at (j + 0.5, i + 0.5); the border is repeated."""
    _, height, width = image.shape
    column, row = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
    value = np.zeros(3)
    for i, j in product(range(height), range(width)):
        value += max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j)) * image[:, i, j]
    return value


def count_pixels(mask):
    return sum(bool(pixel) for row in mask for pixel in row)


def instances_of(labels):
    values = (labels.labels.tolist(), labels.scores.tolist(), labels.quality.tolist())
    arrays = labels.masks.numpy(), labels.doubts.numpy()
    instances = map(Instance, *values, *arrays)
    return [instance for instance in instances if instance.mask.any()]


def random_batch(batch, seed, dtype=torch.uint8):
    """Frames of various sizes with up to four ragged masks; some images and masks are empty."""
    generator = seeded(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    images, labels = [], []
    for index in range(batch):
        size, count = (draw(3, 9), draw(3, 10)), draw(0, 4)
        images.append((255 * torch.rand(3, *size, generator=generator)).to(dtype))
        masks = torch.zeros(count, *size, dtype=torch.bool)
        for mask in masks:
            top, left = draw(0, size[0] - 1), draw(0, size[1] - 1)
            box = mask[top : top + draw(1, 7), left : left + draw(1, 7)]
            box[:] = torch.rand(box.shape, generator=generator) < draw(0, 4) / 3
        scores, quality = torch.rand(2, count, generator=generator)
        doubts = torch.randint(1, 256, masks.shape, generator=generator, dtype=torch.uint8)
        fields = {"quality": quality, "doubts": doubts}
        labels.append(PseudoLabels(10 * index + torch.arange(count), masks, scores, **fields))
    return images, labels


def assert_same_instances(labels, expected):
    assert labels.labels.tolist() == [instance.label for instance in expected]
    assert labels.scores.tolist() == [instance.score for instance in expected]
    assert labels.quality.tolist() == [instance.quality for instance in expected]
    for mask, doubts, instance in zip(labels.masks, labels.doubts, expected, strict=True):
        np.testing.assert_array_equal(mask.numpy(), instance.mask)
        np.testing.assert_array_equal(doubts.numpy(), instance.doubts)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@settings(max_examples=100)
@given(
    batch=st.sampled_from([0, 1, 2, 3, 4, 7, 8, 9]),
    seed=st.integers(0, 10**6),
    min_area=st.sampled_from([1, 3, 5.5, 9]),
    scale_range=st.sampled_from([None, None, (0.8, 1.2), (0.4, 0.7), (1.5, 2.5), (1.0, 1.0)]),
)
def test_the_exchange_equals_the_loop_over_pixels(dtype, batch, seed, min_area, scale_range):
    """``scale_range`` None: static placement, which is exact."""
    images, labels = random_batch(batch, seed, dtype)
    expected = arp_literally(images, labels, generators(batch, seed), min_area, scale_range)
    placed = scale_range is not None
    assume(not placed or all(r is None or r.edge > ON_AN_EDGE for r in expected))
    before = copy.deepcopy(images), [label.masks.clone() for label in labels]
    changes = {"random_placement": True, "scale_range": scale_range} if placed else {}
    arp = ARP(min_area=min_area, **changes)
    new_images, new_labels = arp(images, labels, generators(batch, seed))
    assert all(map(torch.equal, images, before[0])), "inputs are never mutated"
    assert all(torch.equal(x.masks, masks) for x, masks in zip(labels, before[1], strict=True))
    assert len(new_images) == len(new_labels) == batch
    rounding = (0.5 + 1e-3 if dtype == torch.uint8 else 1e-3) if placed else 0
    for index, result in enumerate(expected):
        if result is None:
            assert torch.equal(new_images[index], images[index])
            assert_same_instances(new_labels[index], instances_of(labels[index]))
            continue
        assert new_images[index].dtype == dtype
        found = new_images[index].double().numpy()
        np.testing.assert_allclose(found, result.image.astype(float), rtol=0, atol=rounding)
        assert_same_instances(new_labels[index], result.instances)


def test_all_pairs_are_equally_likely():
    size, batch, draws = (2, 2), 5, 500
    images = [torch.full((3, *size), float(i)) for i in range(batch)]
    full = torch.ones(1, *size, dtype=torch.bool)
    labels = [PseudoLabels(torch.tensor([i]), full, torch.ones(1)) for i in range(batch)]
    counts = dict.fromkeys(combinations(range(batch), 2), 0)
    generator = seeded(0)
    for _ in range(draws):
        new_images, _ = ARP(min_area=1)(images, labels, [generator] * batch)
        pair = tuple(i for i, image in enumerate(new_images) if image is not images[i])
        counts[pair] += 1
    assert chisquare(list(counts.values())).pvalue > 0.01


def test_the_config_gives_the_minimum_area_of_the_training_crop():
    cfg = load_config("")
    with pytest.raises(ConfigError, match="INPUT.CROP"):
        ARP(cfg)  # has no size in pixels
    words = ["INPUT.IMAGE_SIZE", "640", "INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
    words += ["INPUT.CROP.SIZE", "[512, 1024]", "S4M.ARP.MIN_AREA_FRACTION", "0.01"]
    words += ["S4M.ARP.RANDOM_PLACEMENT", "True", "INPUT.DATASET_MAPPER_NAME"]
    for mapper, area in (("mask_former_instance", 512 * 1024), ("coco_instance_lsj", 640**2)):
        arp = ARP(load_config("", [*words, mapper]))
        assert arp.min_area == pytest.approx(0.01 * area)
        assert arp.random_placement and arp.scale_range == (0.8, 1.2)
