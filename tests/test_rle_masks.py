"""Encoded masks where Detectron2 has a tensor of masks."""

import numpy as np
import pytest
import torch
from detectron2.structures import Instances

from s4m_d2.structures import RLEMasks, encode_masks

HEIGHT, WIDTH = 5, 7
DENSE = torch.rand(4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) > 0.5
DENSE[2] = False


def encoded():
    return RLEMasks(encode_masks(DENSE), (HEIGHT, WIDTH))


def test_counts_are_coco_s_by_column_from_background_on():
    mask = torch.zeros(1, 3, 2, dtype=torch.bool)
    mask[0, 1:, 0] = True
    mask[0, 0, 1] = True
    (rle,) = encode_masks(mask)
    assert rle["size"] == [3, 2]
    # "one pixel without, three with, two without"; a character is 48 + the number below 16
    assert rle["counts"] == b"132"


def test_iteration_and_integers_give_the_masks():
    masks = encoded()
    assert len(masks) == 4
    assert torch.equal(torch.stack(list(masks)), DENSE)
    for index in (0, 2, -1):
        assert torch.equal(masks[index], DENSE[index])
    with pytest.raises(IndexError):
        masks[4]


def test_other_indices_give_encoded_masks():
    some = torch.tensor([True, False, False, True])
    for index in (slice(1, 3), slice(0, 0), [3, 0, 0], torch.tensor([2, 1]), some):
        chosen = encoded()[index]
        assert isinstance(chosen, RLEMasks) and chosen.image_size == (HEIGHT, WIDTH)
        assert np.array_equal(np.asarray(chosen), DENSE[index].numpy())


def test_inside_detectron2_s_instances():
    scores = torch.tensor([0.9, 0.2, 0.8, 0.7])
    instances = Instances((HEIGHT, WIDTH), pred_masks=encoded(), scores=scores)
    good = instances[instances.scores > 0.5].to("cpu")
    assert np.array_equal(np.asarray(good.pred_masks), DENSE[[0, 2, 3]].numpy())
    both = Instances.cat([instances[1], good])
    assert np.array_equal(np.asarray(both.pred_masks), DENSE[[1, 0, 2, 3]].numpy())
