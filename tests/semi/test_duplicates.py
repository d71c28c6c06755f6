"""Duplicates among pseudo-labels: by hand, and against the definition taken literally."""

import torch
from arp_batches import rectangle, seeded
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.semi.duplicates import mark_duplicates
from s4m_d2.structures import PseudoLabels

SIZE = (10, 10)


def labels_of(masks, scores, classes=None, valid=None) -> PseudoLabels:
    return PseudoLabels(
        torch.tensor(classes if classes is not None else [0] * len(scores)),
        torch.stack(masks),
        torch.tensor(scores),
        None if valid is None else torch.tensor(valid),
    )


def row(pixels: int) -> torch.Tensor:
    """The first pixels of the first row; IoUs of two of them are quotients of their lengths."""
    return rectangle(SIZE, 0, 0, 1, pixels)


def valid_after(labels: PseudoLabels, iou_thresh: float) -> list[bool]:
    [marked], count = mark_duplicates([labels], iou_thresh)
    before = len(labels) if labels.valid is None else int(labels.valid.sum())
    assert int(count) == before - int(marked.valid.sum())
    assert torch.equal(marked.masks, labels.masks) and torch.equal(marked.scores, labels.scores)
    return marked.valid.tolist()


def test_the_most_certain_label_of_an_instance_stays_whatever_the_classes():
    labels = labels_of([row(8), row(9), row(10)], [0.7, 0.9, 0.8], classes=[0, 1, 2])
    assert valid_after(labels, 0.75) == [False, True, False]  # IoUs 8/9 and 9/10 with the second


def test_the_iou_must_exceed_the_threshold():
    labels = labels_of([row(4), row(8)], [0.9, 0.8])  # 4 of 8 pixels
    assert valid_after(labels, 0.5) == [True, True]
    assert valid_after(labels, 0.49) == [True, False]


def test_touching_and_nested_instances_stay():
    left, right = rectangle(SIZE, 0, 0, 10, 5), rectangle(SIZE, 0, 5, 10, 5)
    inside = rectangle(SIZE, 2, 1, 3, 3)
    assert valid_after(labels_of([left, right, inside], [0.9, 0.8, 0.7]), 0.6) == [True] * 3


def test_of_equal_scores_the_first_stays():
    assert valid_after(labels_of([row(5)] * 3, [0.8] * 3), 0.7) == [True, False, False]


def test_labels_that_are_not_there_neither_take_part_nor_come_back():
    labels = labels_of([row(5)] * 3, [0.9, 0.8, 0.7], valid=[False, True, True])
    assert valid_after(labels, 0.7) == [False, True, False]


def test_empty_masks_are_no_duplicates_of_each_other():
    nothing = torch.zeros(SIZE, dtype=torch.bool)
    assert valid_after(labels_of([nothing, nothing], [0.9, 0.8]), 0.0) == [True, True]


def test_images_are_looked_at_alone_and_may_be_empty():
    labels = [labels_of([row(5)], [0.9]), PseudoLabels.empty(SIZE), labels_of([row(5)], [0.8])]
    marked, count = mark_duplicates(labels, 0.5)
    assert [label.valid.tolist() for label in marked] == [[True], [], [True]]
    assert int(count) == 0
    assert int(mark_duplicates([], 0.5)[1]) == 0


@given(seed=st.integers(0, 1000), thresh=st.sampled_from([0.2, 0.5, 0.8]), flags=st.booleans())
def test_as_defined(seed, thresh, flags):
    generator = seeded(seed)
    masks = [
        rectangle(SIZE, *torch.randint(0, 4, (2,), generator=generator).tolist(),
                  *torch.randint(1, 7, (2,), generator=generator).tolist())
        for _ in range(6)
    ]  # fmt: skip
    scores = (torch.randint(0, 4, (6,), generator=generator) / 4).tolist()
    valid = (torch.rand(6, generator=generator) < 0.7).tolist() if flags else None
    there = valid or [True] * 6
    expected = []
    for i in range(6):
        better = [
            j for j in range(6)
            if there[j] and (scores[j] > scores[i] or (scores[j] == scores[i] and j < i))
        ]  # fmt: skip
        same = [
            (masks[i] & masks[j]).sum().item() / (masks[i] | masks[j]).sum().item() > thresh
            for j in better
        ]
        expected.append(there[i] and not any(same))
    assert valid_after(labels_of(masks, scores, valid=valid), thresh) == expected
