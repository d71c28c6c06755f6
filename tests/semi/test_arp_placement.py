"""The dynamic variant of ARP: scales, positions and the resampling of image and mask."""

import pytest
import torch
from arp_batches import generators, labels_of, rectangle, seeded
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.semi.arp import ARP, draw_placement
from s4m_d2.structures import PseudoLabels


def coordinate_image(size) -> torch.Tensor:
    """Each pixel's own center (x, y), and -1."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, -1.0)])


@given(seed=st.integers(0, 10**6))
def test_dynamic_image_and_mask_go_through_one_scale_and_shift(seed):
    """The pasted pixels of an image of coordinates tell where they came from."""
    source_size, base_size = (30, 44), (37, 29)
    mask = rectangle(source_size, 8, 10, 12, 9)
    mask[8:12, 10:13] = False  # not a rectangle
    images = [coordinate_image(source_size), torch.zeros(3, *base_size)]
    labels = [labels_of([mask]), PseudoLabels.empty(base_size)]
    arp = ARP(min_area=1, random_placement=True, scale_range=(0.5, 2.0))
    new_images, new_labels = arp(images, labels, generators(2, seed))
    [pasted] = new_labels[1].masks
    assert torch.equal(new_images[1][2] == -1, pasted)

    came_from = new_images[1][:2, pasted]
    x, y = came_from.floor().long()
    assert mask[y, x].all()
    here = coordinate_image(base_size)[:2, pasted]
    scale = (here[:, 0] - here[:, -1]) / (came_from[:, 0] - came_from[:, -1])
    assert (scale > 0.5 - 1e-3).all() and (scale < 2 + 1e-3).all()
    torch.testing.assert_close(scale[0], scale[1], rtol=1e-3, atol=0)
    shift = here - scale[:, None] * came_from
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-2)

    offset = shift.double().mean(dim=1)
    origin = (coordinate_image(base_size)[:2].double() - offset[:, None, None]) / float(scale[0])
    x, y = origin.floor().long()
    inside = (x >= 0) & (x < source_size[1]) & (y >= 0) & (y < source_size[0])
    expected = torch.zeros(base_size, dtype=torch.bool)
    expected[inside] = mask[y[inside], x[inside]]
    sure = ((origin - origin.round()).abs() > 1e-2).all(dim=0)
    assert torch.equal(pasted[sure], expected[sure]), "and no pixel of the instance is left out"


def test_scales_and_positions_are_uniform_and_inside_the_frame():
    size, base = (40, 60), (50, 80)
    masks = rectangle(size, 11, 20, 10, 16).expand(4000, -1, -1)
    placement = draw_placement(masks, base, (0.8, 1.2), seeded(0))
    assert placement.scale.min() >= 0.8 - 1e-6 and placement.scale.max() <= 1.2 + 1e-6
    assert placement.scale.mean().item() == pytest.approx(1.0, abs=0.01)
    start = placement.scale[:, None] * torch.tensor([20.0, 11.0]) + placement.offset
    end = placement.scale[:, None] * torch.tensor([36.0, 21.0]) + placement.offset
    frame = torch.tensor([80.0, 50.0])
    assert (start > -1e-4).all() and (end < frame + 1e-4).all()
    position = start / (frame - (end - start))
    torch.testing.assert_close(position.mean(0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)
    assert (position.amin(0) < 0.01).all() and (position.amax(0) > 0.99).all()
    draws = torch.stack([placement.scale, *position.T])
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.05, "drawn independently"


def test_an_instance_larger_than_the_frame_covers_it():
    images = [torch.ones(3, 40, 50), torch.zeros(3, 8, 50)]
    labels = [labels_of([rectangle((40, 50), 2, 4, 30, 20)]), PseudoLabels.empty((8, 50))]
    for seed in range(10):
        arp = ARP(min_area=1, random_placement=True)
        _, new_labels = arp(images, labels, generators(2, seed))
        columns = new_labels[1].masks[0].all(dim=0)
        assert torch.equal(columns, new_labels[1].masks[0].any(dim=0))
        assert 15 <= columns.sum() <= 25


def test_each_instance_has_a_placement_of_its_own():
    size = (60, 60)
    labels = [
        labels_of([rectangle(size, 0, 0, 10, 10), rectangle(size, 0, 20, 10, 10)]),
        PseudoLabels.empty(size),
    ]
    arp = ARP(min_area=1, random_placement=True)
    masks = arp([torch.zeros(3, *size)] * 2, labels, generators(2, 3))[1][1].masks
    corners = [mask.nonzero().amin(0) for mask in masks]
    assert corners[0][0] != corners[1][0]
    assert corners[1][1] - corners[0][1] != 20


def test_the_receiving_images_generator_places_what_it_receives():
    size = (60, 60)
    labels = [labels_of([rectangle(size, 0, 0, 10, 10)]), PseudoLabels.empty(size)]
    arp = ARP(min_area=1, random_placement=True)
    results = {
        seeds: arp([torch.zeros(3, *size)] * 2, labels, [seeded(seed) for seed in seeds])[1][
            1
        ].masks
        for seeds in ((0, 1), (2, 1), (0, 3))
    }
    assert torch.equal(results[0, 1], results[2, 1])
    assert not torch.equal(results[0, 1], results[0, 3])
