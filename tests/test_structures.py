"""PseudoLabels, encoded masks where Detectron2 has a tensor of masks, and copies to the host."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2 import structures
from s4m_d2.errors import InputError
from s4m_d2.structures import (
    PseudoLabels,
    RLEMasks,
    drop_empty,
    encode_masks,
    mask_areas,
    mask_boxes,
)
from s4m_d2.transfers import to_device, to_host

DENSE = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
DENSE[2] = False


def make_labels() -> PseudoLabels:
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    masks[2, 3, 0] = True
    return PseudoLabels(torch.tensor([5, 0, 2]), masks, torch.tensor([0.9, 0.8, 0.7]))


def test_disagreeing_parts_are_refused():
    two, flat, ones = torch.zeros(2).long(), torch.zeros(2, 3, 3).bool(), torch.ones(2)
    for labels, masks, scores in (
        (two, flat.float(), ones),
        (two, flat[0], ones),
        (two.int(), flat, ones),
        (two, flat, two),
        (two[:1], flat, ones),
        (two, flat, ones[:, None]),
    ):
        with pytest.raises(InputError):
            PseudoLabels(labels, masks, scores)


def test_indexing_keeps_labels_masks_and_scores_aligned():
    for index in (torch.tensor([True, False, True]), torch.tensor([0, 2]), slice(0, 3, 2)):
        labels = make_labels()
        kept = labels[index]
        assert kept.labels.tolist() == [5, 2]
        assert torch.equal(kept.masks, labels.masks[[0, 2]])
        assert torch.equal(kept.scores, labels.scores[[0, 2]])


@pytest.mark.parametrize("count", [3, 0])
def test_instances_carry_the_same_classes_and_tight_boxes(count):
    labels = make_labels()[:count]
    instances = labels.to_instances()
    assert instances.image_size == (4, 6) and len(instances) == count
    assert torch.equal(instances.gt_classes, labels.labels)
    assert torch.equal(instances.gt_masks.tensor, labels.masks)
    expected = [[2, 1, 5, 3], [0, 0, 0, 0], [0, 3, 1, 4]][:count]
    assert instances.gt_boxes.tensor.tolist() == expected


def test_generators_come_from_the_samples_own_seeds():
    batch = [{"seeds": {"arp": 7, "loss_points": 8}}, {"seeds": {"arp": 9, "loss_points": 8}}]
    draws = [torch.rand(3, generator=g) for g in structures.sample_generators(batch, "arp", "cpu")]
    assert torch.equal(draws[0], torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(draws[1], torch.rand(3, generator=torch.Generator().manual_seed(9)))
    assert structures.sample_generators([*batch, {}], "arp", "cpu") is None


@given(seed=st.integers(0, 10**6), count=st.integers(0, 4))
def test_measures_of_masks_are_those_of_their_pixels(seed, count):
    """Also of masks taller than a byte counts, full ones and ones that are views of others."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(count, 1, 1, generator=generator).mul(1.6).sub(0.3)
    masks = torch.rand(count, 5, 600, generator=generator) < density
    for view in (masks, masks.transpose(1, 2), masks[:, 1:4, 7:9]):
        assert mask_areas(view).tolist() == [int(mask.sum()) for mask in view]
        assert torch.equal(mask_boxes(view), BitMasks(view).get_bounding_boxes().tensor)


def test_areas_go_with_their_instances_and_empty_ones_can_be_dropped():
    labels = make_labels()
    masks = labels.masks.clone()
    masks[1] = False
    holey = labels.with_masks(masks)
    kept, whole, nothing = drop_empty([holey, labels, holey[1:2]])
    assert kept.labels.tolist() == labels.labels[[0, 2]].tolist()
    assert torch.equal(kept.masks, masks[[0, 2]])
    for label in (kept, whole, kept[1:]):
        assert label.areas.tolist() == label.masks.flatten(1).sum(1).tolist()
    assert kept.with_masks(~kept.masks).areas is None
    assert len(nothing) == 0 and nothing.image_size == (4, 6)


def encoded():
    return RLEMasks(encode_masks(DENSE), (5, 7))


def test_counts_are_coco_s_by_column_from_background_on():
    mask = torch.zeros(1, 3, 2, dtype=torch.bool)
    mask[0, 1:, 0] = True
    mask[0, 0, 1] = True
    (rle,) = encode_masks(mask)
    assert rle["size"] == [3, 2]
    # "one pixel without, three with, two without"; a character is 48 + the number below 16
    assert rle["counts"] == b"132"


def test_an_index_decodes_one_mask_and_others_give_encoded_masks():
    assert torch.equal(torch.stack(list(encoded())), DENSE)
    assert all(torch.equal(encoded()[index], DENSE[index]) for index in (0, 2, -1))
    with pytest.raises(IndexError):
        encoded()[4]
    some = torch.tensor([True, False, False, True])
    for index in (slice(1, 3), slice(0, 0), [3, 0, 0], torch.tensor([2, 1]), some):
        chosen = encoded()[index]
        assert isinstance(chosen, RLEMasks) and chosen.image_size == (5, 7)
        assert np.array_equal(np.asarray(chosen), DENSE[index].numpy())


def test_inside_detectron2_s_instances():
    scores = torch.tensor([0.9, 0.2, 0.8, 0.7])
    instances = Instances((5, 7), pred_masks=encoded(), scores=scores)
    good = instances[instances.scores > 0.5].to("cpu")
    assert np.array_equal(np.asarray(good.pred_masks), DENSE[[0, 2, 3]].numpy())
    both = Instances.cat([instances[1], good])
    assert np.array_equal(np.asarray(both.pred_masks), DENSE[[1, 0, 2, 3]].numpy())


TENSORS = [
    torch.tensor([[True, False, True]]),
    torch.tensor(2.5, dtype=torch.float64),
    torch.zeros(0, 3, dtype=torch.int64),
    torch.arange(5, dtype=torch.uint8)[::2],
    torch.tensor([-1, 1 << 40]),
    torch.tensor([1.5], requires_grad=True),
]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_every_tensor_comes_back_as_it_was(device):
    arrays = to_host(*(tensor.to(device) for tensor in TENSORS))
    for array, tensor in zip(arrays, TENSORS, strict=True):
        expected = tensor.detach().numpy()
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_what_the_host_knows_becomes_a_tensor():
    for values, dtype, expected in (
        ([[1, 2]], torch.float32, torch.tensor([[1.0, 2.0]])),
        (np.array([True, False]), None, torch.tensor([True, False])),
        (torch.tensor([3, 4]), None, torch.tensor([3, 4])),
        ([], torch.int64, torch.zeros(0, dtype=torch.int64)),
    ):
        torch.testing.assert_close(to_device(values, "cpu", dtype), expected, rtol=0, atol=0)
