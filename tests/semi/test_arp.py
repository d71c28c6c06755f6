"""ARP: what goes with instances, its settings, and what is refused. The exchange: *_reference."""

from dataclasses import replace

import pytest
import torch
from hand_made import labels_of, rectangle
from seeds import generators

from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError
from s4m_d2.semi.arp import ARP

MIN_AREA = 6


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


def test_the_config_gives_the_minimum_area_of_the_training_crop():
    cfg = load_config("")
    with pytest.raises(ConfigError, match="INPUT.CROP"):
        ARP(cfg)  # has no size in pixels
    words = ["INPUT.IMAGE_SIZE", "640", "INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
    words += ["INPUT.CROP.SIZE", "[512, 1024]", "S4M.ARP.MIN_AREA_FRACTION", "0.01"]
    words += ["S4M.ARP.RANDOM_PLACEMENT", "True", "INPUT.DATASET_MAPPER_NAME"]
    for mapper, area in (("mask_former_instance", 512 * 1024), ("coco_instance_lsj", 640**2)):
        arp = ARP(load_config("", [*words, mapper]))
        assert arp.min_area == pytest.approx(0.01 * area)
        assert arp.random_placement and arp.scale_range == (0.8, 1.2)
