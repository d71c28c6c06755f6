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
MASK = rectangle(SIZE, 0, 0, 1, 5)


def labels_of(masks, scores) -> PseudoLabels:
    return PseudoLabels(torch.zeros(len(scores)).long(), torch.stack(masks), torch.tensor(scores))


def kept(labels: PseudoLabels, *threshs: float) -> list[bool]:
    """Which labels stay; told apart by classes, which do not matter."""
    named = replace(labels, labels=torch.arange(len(labels)))
    [left] = drop_duplicates([named], *threshs)
    assert torch.equal(left.masks, labels.masks[left.labels])
    assert torch.equal(left.scores, labels.scores[left.labels])
    return [index in left.labels.tolist() for index in range(len(labels))]


def test_images_are_looked_at_alone_and_may_be_empty():
    labels = [labels_of([MASK], [0.9]), PseudoLabels.empty(SIZE), labels_of([MASK], [0.8])]
    assert [len(label) for label in drop_duplicates(labels, 0.5)] == [1, 0, 1]
    assert drop_duplicates([], 0.5) == []


@given(
    seed=st.integers(0, 1000),
    iou_thresh=st.sampled_from([0.25, 0.5, 1.0]),
    overlap_thresh=st.sampled_from([0.5, 0.75, 1.0]),
    has_quality=st.booleans(),
)
def test_as_defined(seed, iou_thresh, overlap_thresh, has_quality):
    """Masks are small: some are empty, and many IoUs and overlaps equal the thresholds."""
    generator = seeded(seed)
    places = torch.randint(0, 4, (8, 4), generator=generator).tolist()
    masks = [rectangle(SIZE, *place) for place in places]
    values = (torch.randint(0, 4, (8,), generator=generator) / 4).tolist()
    labels = labels_of(masks, [1.0] * 8 if has_quality else values)
    if has_quality:
        labels = replace(labels, quality=torch.tensor(values))
    expected = []
    for i in range(8):
        better = [j for j in range(8) if (-values[j], j) < (-values[i], i)]
        is_same = False
        for j in better:
            shared, either = ((masks[i] & masks[j]).sum(), (masks[i] | masks[j]).sum())
            is_same |= bool(shared > iou_thresh * either)
            is_same |= bool(shared > overlap_thresh * min(masks[i].sum(), masks[j].sum()))
        expected.append(not is_same)
    assert kept(labels, iou_thresh, overlap_thresh) == expected
