"""ARP's settings, and what is refused. The exchange: *_reference."""

import pytest

from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError
from s4m_d2.semi.arp import ARP


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
