"""Quality of pseudo-labels: by hand, against a literal reference, and by its properties."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_quality import counts

from s4m_d2 import evaluation
from s4m_d2.evaluation import COUNTS, MEASURES, SIZES, PseudoLabelQuality, quality_of
from s4m_d2.structures import PseudoLabels

CLASSES = ["apple", "pear", "plum"]
APPLE, PEAR, PLUM = range(3)
HEIGHT, WIDTH = 20, 20
LIMITS = (30.0, 70.0)


@pytest.fixture(autouse=True, scope="module")
def sizes_of_small_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "SIZE_LIMITS", LIMITS)
        yield


def stack(masks):
    return torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, HEIGHT, WIDTH))


def rows(start, stop, columns=slice(0, 10)):
    """A mask of (stop - start) x 10 px."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[start:stop, columns] = True
    return mask


def labels_of(entries):
    """Pseudo-labels of (class id, mask[, score])."""
    entries = [(*entry, 0.9)[:3] for entry in entries]
    return PseudoLabels(
        torch.tensor([entry[0] for entry in entries], dtype=torch.int64),
        stack([entry[1] for entry in entries]),
        torch.tensor([entry[2] for entry in entries], dtype=torch.float64),
    )


def measured(*images, pixel_area=1.0):
    """Of images, each a pair of pseudo-labels and (class id, mask[, is crowd])."""
    quality = PseudoLabelQuality(CLASSES)
    for labels, truth in images:
        truth = [(*entry, False)[:3] for entry in truth]
        quality.add(
            labels_of(labels),
            torch.tensor([entry[0] for entry in truth], dtype=torch.int64),
            stack([entry[1] for entry in truth]),
            torch.tensor([entry[2] for entry in truth], dtype=torch.bool),
            pixel_area=pixel_area,
        )
    return quality


def same_cells(first, second):
    np.testing.assert_allclose(first.cells, second.cells, rtol=1e-12, atol=0)


# One image: an apple found with IoU 8/10 and called so, a pear found with IoU 6/10 and called plum,
# a plum that nothing matches (IoU 5/10 is too little), and a label on nothing.
TRUTH = [(APPLE, rows(0, 10)), (PEAR, rows(10, 20)), (PLUM, rows(0, 4, slice(10, 20)))]
LABELS = [
    (APPLE, rows(0, 8)),
    (PLUM, rows(14, 20)),
    (PLUM, rows(0, 2, slice(10, 20))),
    (APPLE, rows(15, 20, slice(10, 20))),
]


def test_an_image_by_hand():
    quality = measured((LABELS, TRUTH)).overall()
    counts = {"instances": 3, "found": 2, "pseudo_labels": 4, "matched": 2, "correct": 1}
    expected = {
        "class_accuracy": 1 / 2,
        "sq": (0.8 + 0.6) / 2,
        "precision": 1 / 4,
        "recall": 1 / 3,
        "mask_precision": 2 / 4,
        "mask_recall": 2 / 3,
        "rq": 1 / (1 + 3 / 2 + 2 / 2),
        "pq": 0.8 / (1 + 3 / 2 + 2 / 2),  # RQ x the correct matches' mean IoU
    }
    assert quality == pytest.approx(expected | counts | {"duplicates": 0, "in_crowds": 0})


def test_images_without_labels_without_instances_or_without_both():
    nothing = measured(([], []))
    assert nothing.images == 1
    assert {nothing.overall()[name] for name in MEASURES} == {None}
    assert set(nothing.as_dict()["overall"].values()) == {None, 0}
    missed = measured(([], TRUTH)).overall()
    assert missed["recall"] == missed["rq"] == 0 and missed["precision"] is None
    invented = measured((LABELS, [])).overall()
    assert invented["precision"] == invented["pq"] == 0 and invented["recall"] is None
    crowd = measured((LABELS, [(PEAR, rows(0, 20, slice(0, 20)), True)])).overall()
    assert (crowd["pseudo_labels"], crowd["instances"], crowd["in_crowds"]) == (0, 0, 4)


def scenes(seed, number):
    """Random images: boxes that overlap, some of them shifted copies of the truth, and crowds."""
    rng = np.random.default_rng(seed)

    def box():
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        y, x = rng.integers(0, 14, 2)
        mask[y : y + rng.integers(1, 9), x : x + rng.integers(1, 9)] = True
        return mask

    images = []
    for _ in range(number):
        truth = [
            (int(rng.integers(3)), box(), bool(rng.random() < 0.2)) for _ in range(rng.integers(7))
        ]
        copies = [mask & np.roll(mask, rng.integers(-1, 2), axis=1) for _, mask, _ in truth * 2]
        masks = [mask for mask in copies if rng.random() < 0.6] + [box(), box()]
        scores = rng.integers(7, 10, len(masks)) / 10  # some are equal
        labels = [(int(rng.integers(3)), m, s) for m, s in zip(masks, scores, strict=True)]
        images.append((labels[: rng.integers(len(labels) + 1)], truth))
    return images


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_a_literal_reference(seed):
    images = scenes(seed, 12)
    quality, expected = measured(*images, pixel_area=0.75), counts(images, LIMITS, 0.75)
    cells = quality.cells
    groups = {("all", None): cells.sum((0, 1))}
    groups |= {("class", index): part for index, part in enumerate(cells.sum(0))}
    groups |= {("size", name): part for name, part in zip(SIZES, cells.sum(1), strict=True)}
    for group, part in groups.items():
        literal = [float(expected.get(group, {}).get(name, 0)) for name in COUNTS]
        assert part.tolist() == pytest.approx(literal, rel=1e-12)
    overall = quality.overall()
    assert overall["found"] > 5 and overall["duplicates"] > 0
    assert quality.by_class()["pear"] == quality_of(groups[("class", PEAR)])
    assert quality.by_size()["medium"] == quality_of(groups[("size", "medium")])


@settings(max_examples=12)
@given(st.integers(0, 1000), st.integers(0, 4), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_parts_merged_are_the_whole(seed, split, random):
    images = scenes(seed, 4)
    mixed = [(random.sample(mine, len(mine)), random.sample(t, len(t))) for mine, t in images]
    random.shuffle(mixed)
    merged, rest = measured(*mixed[:split]), measured(*mixed[split:])
    merged.merge(rest)
    same_cells(merged, measured(*images))
    assert merged.images == 4


def test_the_example_of_the_docs():
    names = {"torch": torch, "PseudoLabels": PseudoLabels}
    assert doctest.testmod(evaluation, extraglobs=names).failed == 0


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    expected, quality = measured((LABELS, TRUTH)), PseudoLabelQuality(CLASSES)
    labels = labels_of(LABELS)
    on_gpu = PseudoLabels(labels.labels.cuda(), labels.masks.cuda(), labels.scores.cuda())
    quality.add(on_gpu, torch.tensor([t[0] for t in TRUTH]), stack([t[1] for t in TRUTH]))
    same_cells(quality, expected)
