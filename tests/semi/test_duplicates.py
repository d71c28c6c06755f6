"""Duplicates among pseudo-labels: by hand, and against the definition taken literally."""

from dataclasses import replace

import torch
from hand_made import rectangle
from hypothesis import given
from hypothesis import strategies as st
from seeds import seeded

from s4m_d2.semi.filters import drop_duplicates
from s4m_d2.structures import PseudoLabels

SIZE = (10, 10)


def labels_of(masks, scores) -> PseudoLabels:
    return PseudoLabels(torch.zeros(len(scores)).long(), torch.stack(masks), torch.tensor(scores))


def row(pixels: int) -> torch.Tensor:
    """The first pixels of the first row; IoUs of two of them are quotients of their lengths."""
    return rectangle(SIZE, 0, 0, 1, pixels)


def kept(labels: PseudoLabels, *threshs: float) -> list[bool]:
    """Which labels stay; told apart by classes, which do not matter."""
    named = replace(labels, labels=torch.arange(len(labels)))
    [left] = drop_duplicates([named], *threshs)
    assert torch.equal(left.masks, labels.masks[left.labels])
    assert torch.equal(left.scores, labels.scores[left.labels])
    return [index in left.labels.tolist() for index in range(len(labels))]


def test_the_iou_must_exceed_the_threshold():
    labels = labels_of([row(4), row(8)], [0.9, 0.8])  # 4 of 8 pixels
    assert kept(labels, 0.5) == [True, True]
    assert kept(labels, 0.49) == [True, False]


def test_a_part_of_another_one_exceeds_the_overlap():
    labels = labels_of([row(4), row(8)], [0.9, 0.8])
    assert kept(labels, 1.0, 1.0) == [True, True]
    assert kept(labels, 1.0, 0.99) == [True, False]
    apart = rectangle(SIZE, 0, 2, 1, 4)  # shares 2 of its 4 pixels
    assert kept(labels_of([row(4), apart], [0.8, 0.9]), 1.0, 0.5) == [True, True]
    assert kept(labels_of([row(4), apart], [0.8, 0.9]), 1.0, 0.49) == [False, True]


def test_the_better_one_has_the_higher_product_of_score_and_quality():
    labels = labels_of([row(4), row(4)], [0.9, 0.8])
    labels = replace(labels, quality=torch.tensor([0.8, 1.0]))
    assert kept(labels, 0.5) == [False, True]


def test_empty_masks_are_no_duplicates_of_each_other():
    nothing = torch.zeros(SIZE, dtype=torch.bool)
    assert kept(labels_of([nothing, nothing], [0.9, 0.8]), 0.0) == [True, True]


def test_images_are_looked_at_alone_and_may_be_empty():
    labels = [labels_of([row(5)], [0.9]), PseudoLabels.empty(SIZE), labels_of([row(5)], [0.8])]
    assert [len(label) for label in drop_duplicates(labels, 0.5)] == [1, 0, 1]
    assert drop_duplicates([], 0.5) == []


@given(seed=st.integers(0, 1000), thresh=st.sampled_from([0.2, 0.5, 0.8]))
def test_as_defined(seed, thresh):
    generator = seeded(seed)
    masks = [
        rectangle(SIZE, *torch.randint(0, 4, (2,), generator=generator).tolist(),
                  *torch.randint(1, 7, (2,), generator=generator).tolist())
        for _ in range(6)
    ]  # fmt: skip
    scores = (torch.randint(0, 4, (6,), generator=generator) / 4).tolist()
    expected = []
    for i in range(6):
        better = [
            j for j in range(6)
            if scores[j] > scores[i] or (scores[j] == scores[i] and j < i)
        ]  # fmt: skip
        same = [
            (masks[i] & masks[j]).sum().item() / (masks[i] | masks[j]).sum().item() > thresh
            for j in better
        ]
        expected.append(not any(same))
    assert kept(labels_of(masks, scores), thresh) == expected
