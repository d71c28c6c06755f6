"""ARP by hand, and what holds for any batch: conservation, disjointness, purity."""

import copy

import pytest
import torch
from arp_batches import generators, labels_of, rectangle, seeded
from detectron2.config import get_cfg
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.semi.arp import ARP, owner_map
from s4m_d2.structures import PseudoLabels

MIN_AREA = 6


def random_batch(batch: int, seed: int):
    """Images of distinct pixel values and up to four rectangles, some overlapping, some small."""
    generator = seeded(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    images, labels = [], []
    for i in range(batch):
        size = (draw(6, 12), draw(6, 14))
        images.append((torch.rand(3, *size, generator=generator) * 25 + 26 * i).to(torch.uint8))
        masks = [
            rectangle(size, draw(0, 5), draw(0, 5), draw(1, 6), draw(1, 6))
            for _ in range(draw(0, 5))
        ]
        labels.append(labels_of(masks, 10 * i, size))
    return images, labels


def exchange(images, labels, generators, **settings):
    return ARP(**settings)(images, labels, generators)


def same(a: PseudoLabels, b: PseudoLabels) -> bool:
    return (
        torch.equal(a.labels, b.labels)
        and torch.equal(a.masks, b.masks)
        and torch.equal(a.scores, b.scores)
    )


@pytest.mark.parametrize(
    ("batch", "pairs"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (7, 1), (8, 2), (9, 2), (12, 3)]
)
def test_disjoint_pairs_exchange_in_both_directions(batch, pairs):
    size = (6, 7)
    images = [torch.full((3, *size), float(i)) for i in range(batch)]
    labels = [labels_of([rectangle(size, 1, 1, 3, 4)], i) for i in range(batch)]
    seen = set()
    for seed in range(30):
        new_images, new_labels = exchange(
            images, labels, generators(batch, seed), min_area=MIN_AREA
        )
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
    new_images, new_labels = exchange(images, [base, source], generators(2), min_area=MIN_AREA)
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


def test_an_area_at_the_minimum_is_pasted():
    size = (5, 5)
    labels = [PseudoLabels.empty(size), labels_of([rectangle(size, 0, 0, 2, 3)])]
    images = [torch.zeros(3, *size), torch.ones(3, *size)]
    assert len(exchange(images, labels, generators(2), min_area=6)[1][0]) == 1
    assert len(exchange(images, labels, generators(2), min_area=6.5)[1][0]) == 0


@pytest.mark.parametrize("random_placement", [False, True])
@given(seed=st.integers(0, 10**6), batch=st.sampled_from([1, 2, 3, 4, 9]))
def test_what_holds_for_any_batch(random_placement, seed, batch):
    images, labels = random_batch(batch, seed)
    rules = dict(min_area=MIN_AREA, random_placement=random_placement)
    before = copy.deepcopy((images, labels))
    new_images, new_labels = exchange(images, labels, generators(batch, seed), **rules)

    assert all(map(torch.equal, images, before[0])), "inputs are never mutated"
    assert all(map(same, labels, before[1]))
    again = exchange(images, labels, generators(batch, seed), **rules)
    assert all(map(torch.equal, new_images, again[0])), "the generators decide"
    assert all(map(same, new_labels, again[1]))

    scores = {
        int(name): float(score)
        for label in labels
        for name, score in zip(label.labels, label.scores, strict=True)
    }
    for i, (image, label) in enumerate(zip(new_images, new_labels, strict=True)):
        assert image.shape == images[i].shape and image.dtype == torch.uint8
        if same(label, labels[i]):
            assert torch.equal(image, images[i])
            continue
        assert label.masks.sum(dim=0).max() <= 1, "disjoint"
        assert label.masks.flatten(1).any(1).all(), "no empty instance"
        assert [scores[int(k)] for k in label.labels] == label.scores.tolist(), "aligned"
        own = label.labels // 10 == i
        pasted = label.masks[~own].any(0)
        assert torch.equal(image[:, ~pasted], images[i][:, ~pasted]), "the base elsewhere"
        source = set((label.labels[~own] // 10).tolist())
        if pasted.any():  # each image has a range of values of its own
            assert source == set((image[:, pasted] // 26).flatten().tolist())
            assert len(source) == 1
        for k, mask in zip(label.labels[own], label.masks[own], strict=True):
            original = labels[i].masks[labels[i].labels == k][0]
            assert not (mask & ~original).any(), "own instances only lose pixels"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_static_pixels_are_exact(dtype):
    size = (200, 317)
    images = [(255 * torch.rand(3, *size, generator=seeded(i))).to(dtype) for i in range(2)]
    labels = [labels_of([rectangle(size, 3, 5, 190, 300)]), PseudoLabels.empty(size)]
    new_images, _ = exchange(images, labels, generators(2), min_area=1)
    mask = labels[0].masks[0]
    assert torch.equal(new_images[1], torch.where(mask, images[0], images[1]))


def test_an_image_without_a_partner_keeps_its_overlapping_masks():
    size = (6, 6)
    overlapping = labels_of([rectangle(size, 0, 0, 4, 4), rectangle(size, 2, 2, 3, 1)])
    labels = [overlapping, PseudoLabels.empty(size)]
    _, new_labels = exchange([torch.zeros(3, *size)] * 2, labels, generators(2), min_area=MIN_AREA)
    assert same(new_labels[0], overlapping), "nothing was pasted onto it"
    assert len(new_labels[1]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_area": -1}, "MIN_AREA_FRACTION"),
        ({"min_area": 1, "pair_fraction": 0.6}, "PAIR_FRACTION"),
        ({"min_area": 1, "pair_fraction": 0.0}, "PAIR_FRACTION"),
        ({"min_area": 1, "scale_range": (1.2, 0.8)}, "SCALE_RANGE"),
        ({"min_area": 1, "scale_range": (0.0, 0.8)}, "SCALE_RANGE"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        ARP(**arguments)


def test_disagreeing_inputs_are_named():
    labels = [PseudoLabels.empty((4, 4)), PseudoLabels.empty((4, 5))]
    images = [torch.zeros(3, 4, 4)] * 2
    with pytest.raises(InputError, match=r"image 1 is \(3, 4, 4\)"):
        ARP(min_area=1)(images, labels)
    with pytest.raises(InputError, match="2 images need as many labels"):
        ARP(min_area=1)(images, labels[:1])


@pytest.mark.parametrize(
    ("mapper", "area"), [("mask_former_instance", 512 * 1024), ("coco_instance_lsj", 640**2)]
)
def test_the_config_gives_the_minimum_area_of_the_training_crop(mapper, area):
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = mapper
    cfg.INPUT.IMAGE_SIZE = 640
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [512, 1024]
    cfg.S4M.ARP.MIN_AREA_FRACTION = 0.01
    cfg.S4M.ARP.RANDOM_PLACEMENT = True
    arp = ARP(cfg)
    assert arp.min_area == pytest.approx(0.01 * area)
    assert arp.random_placement and arp.scale_range == (0.8, 1.2)


def test_a_crop_without_a_size_in_pixels_is_refused():
    cfg = get_cfg()
    add_s4m_config(cfg)
    with pytest.raises(ConfigError, match="INPUT.CROP"):
        ARP(cfg)


def test_owners_are_counted_through_parts_without_masks():
    mask = torch.tensor([[[True, False, True]]])
    assert owner_map([mask[:0], mask]).tolist() == [[1, 0, 1]]
    assert owner_map([mask, ~mask, mask[:0]]).tolist() == [[1, 2, 1]]
