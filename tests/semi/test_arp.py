"""ARP by hand: pairs, a paste, scales and positions, and what is refused."""

from dataclasses import replace

import pytest
import torch
from detectron2.config import get_cfg
from hand_made import labels_of, rectangle
from seeds import generators, seeded

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.semi.arp import ARP, draw_placement, owner_map
from s4m_d2.structures import PseudoLabels

MIN_AREA = 6


@pytest.mark.parametrize(("batch", "pairs"), [(0, 0), (1, 0), (2, 1), (3, 1), (7, 1), (8, 2)])
def test_disjoint_pairs_exchange_in_both_directions(batch, pairs):
    size = (6, 7)
    images = [torch.full((3, *size), float(i)) for i in range(batch)]
    labels = [labels_of([rectangle(size, 1, 1, 3, 4)], i) for i in range(batch)]
    seen = set()
    for seed in range(30):
        new_images, new_labels = ARP(min_area=MIN_AREA)(images, labels, generators(batch, seed))
        partners = {i: int(image[0, 2, 2]) for i, image in enumerate(new_images)}
        changed = {i: partner for i, partner in partners.items() if partner != i}
        assert len(changed) == 2 * pairs
        assert all(changed[partner] == i for i, partner in changed.items())
        assert all(label.labels.tolist() == [partners[i]] for i, label in enumerate(new_labels))
        seen |= set(changed)
    assert seen == (set(range(batch)) if pairs else set()), "every image takes part sometimes"


def test_a_paste_by_hand():
    size = (4, 6)
    base = labels_of([rectangle(size, 0, 0, 4, 3), rectangle(size, 1, 1, 2, 1)], 10)
    source = labels_of([rectangle(size, 0, 1, 3, 2), rectangle(size, 3, 5, 1, 1)], 20)
    images = [torch.zeros(3, *size), torch.ones(3, *size)]
    new_images, new_labels = ARP(min_area=MIN_AREA)(images, [base, source], generators(2))
    expected = torch.tensor(
        [
            [10, 20, 20, 0, 0, 0],
            [10, 20, 20, 0, 0, 0],
            [10, 20, 20, 0, 0, 0],
            [10, 10, 10, 0, 0, 0],
        ]
    )
    assert new_labels[0].labels.tolist() == [10, 20], "11 is covered, 21 is too small"
    drawn = (new_labels[0].masks * new_labels[0].labels[:, None, None]).sum(0)
    assert torch.equal(drawn, expected)
    assert torch.equal(new_images[0], (expected == 20).float().expand(3, -1, -1))
    assert new_labels[1].labels.tolist() == [21, 10], "20 is covered by the larger 10"


@pytest.mark.parametrize("random_placement", [False, True])
def test_pasted_instances_keep_their_quality_and_their_doubts(random_placement):
    """There is none about pixels that were pasted over, or that lie outside of a pasted mask."""
    base = labels_of([rectangle((6, 8), 0, 0, 6, 4)], 10)
    source = labels_of([rectangle((4, 6), 0, 1, 3, 2), rectangle((4, 6), 0, 3, 3, 3)], 20)
    labels = [
        replace(
            its,
            quality=torch.full((len(its),), quality),
            doubts=torch.full(its.masks.shape, doubt, dtype=torch.uint8),
        )
        for its, quality, doubt in ((base, 0.25, 50), (source, 0.75, 90))
    ]
    images = [torch.zeros(3, *its.image_size) for its in labels]
    arp = ARP(min_area=MIN_AREA, random_placement=random_placement)
    _, [mixed, _] = arp(images, labels, generators(2))
    of_source = mixed.labels >= 20
    assert of_source.any() and not of_source.all()
    assert torch.equal(mixed.quality, torch.where(of_source, 0.75, 0.25))
    pasted = mixed.masks[of_source]
    assert torch.equal(mixed.doubts[of_source], pasted * torch.tensor(90, dtype=torch.uint8))
    [own] = mixed.doubts[~of_source]
    assert torch.equal(own == 0, pasted.any(0)) and own.max() == 50


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


def test_arguments_that_cannot_be_are_named():
    for arguments, message in (
        ({"min_area": -1}, "MIN_AREA_FRACTION"),
        ({"min_area": 1, "pair_fraction": 0.6}, "PAIR_FRACTION"),
        ({"min_area": 1, "pair_fraction": 0.0}, "PAIR_FRACTION"),
        ({"min_area": 1, "scale_range": (1.2, 0.8)}, "SCALE_RANGE"),
        ({"min_area": 1, "scale_range": (0.0, 0.8)}, "SCALE_RANGE"),
    ):
        with pytest.raises(InputError, match=message):
            ARP(**arguments)
    labels = [PseudoLabels.empty((4, 4)), PseudoLabels.empty((4, 5))]
    images = [torch.zeros(3, 4, 4)] * 2
    with pytest.raises(InputError, match="image 1"):
        ARP(min_area=1)(images, labels)
    with pytest.raises(InputError, match="2 images"):
        ARP(min_area=1)(images, labels[:1])


def test_the_config_gives_the_minimum_area_of_the_training_crop():
    cfg = get_cfg()
    add_s4m_config(cfg)
    with pytest.raises(ConfigError, match="INPUT.CROP"):
        ARP(cfg)  # has no size in pixels
    cfg.INPUT.IMAGE_SIZE = 640
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [512, 1024]
    cfg.S4M.ARP.MIN_AREA_FRACTION = 0.01
    cfg.S4M.ARP.RANDOM_PLACEMENT = True
    for mapper, area in (("mask_former_instance", 512 * 1024), ("coco_instance_lsj", 640**2)):
        cfg.INPUT.DATASET_MAPPER_NAME = mapper
        arp = ARP(cfg)
        assert arp.min_area == pytest.approx(0.01 * area)
        assert arp.random_placement and arp.scale_range == (0.8, 1.2)


def test_owners_are_counted_through_parts_without_masks():
    mask = torch.tensor([[[True, False, True]]])
    assert owner_map([mask[:0], mask]).tolist() == [[1, 0, 1]]
    assert owner_map([mask, ~mask, mask[:0]]).tolist() == [[1, 2, 1]]
