"""Instances from hand-made queries."""

import torch

from s4m_d2.modeling.inference import instance_inference, largest_components

SIZE = (8, 12)
FULL = {"padded_size": SIZE, "image_size": SIZE, "output_size": SIZE}


def logits_of(probabilities):
    """(Q, K + 1) logits whose softmax gives these class probabilities and the rest to nothing."""
    rows = [[*row, 1 - sum(row)] for row in probabilities]
    return torch.tensor(rows).log()


def box_mask(rows, columns, *, inside=3.0):
    mask = torch.full(SIZE, -5.0)
    mask[slice(*rows), slice(*columns)] = inside
    return mask


MASKS = torch.stack([box_mask((1, 4), (2, 9)), box_mask((5, 8), (0, 3), inside=1.0)])


def test_of_nearly_equal_masks_of_a_class_the_best_stays():
    wide = box_mask((1, 4), (2, 10))  # IoU 21 / 24 with the first mask
    masks = torch.stack([MASKS[0], wide, wide, MASKS[1]])
    logits = logits_of([[0.5, 0.1], [0.6, 0.1], [0.1, 0.7], [0.3, 0.1]])
    result = instance_inference(logits, masks, max_instances=4, duplicate_iou=0.8, **FULL)
    assert result.pred_classes.tolist() == [1, 0, 0]  # the other class, wide, the other place
    assert torch.equal(result.pred_masks[1], wide > 0)
    kept = instance_inference(logits, masks, max_instances=4, duplicate_iou=0.9, **FULL)
    assert len(kept) == 4


def test_the_largest_of_a_masks_regions_stays():
    drawn = """\
        11..2
        11...
        ..2.2
        2....
        2...2""".split()
    place = torch.tensor([[".12".index(c) for c in row] for row in drawn])
    whole, none = torch.ones(5, 5), -torch.ones(5, 5)
    mask = torch.where(place > 0, 2.0, -0.5)
    found = largest_components(torch.stack([mask, whole, none])[None])
    kept = torch.where(place == 2, -2.0, mask)  # a corner that touches does not connect
    torch.testing.assert_close(found, torch.stack([kept, whole, none])[None])
