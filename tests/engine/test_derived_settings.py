"""Settings from hand-made counts and sizes."""

import json
import math
from functools import reduce

import numpy as np
import pytest
from detectron2.structures import BoxMode
from helpers import ROOT, rle_of
from PIL import Image

from s4m_d2.data.annotations import read_annotations
from s4m_d2.engine.config_file import explicit_keys, load_config
from s4m_d2.engine.derived_settings import (
    SET_BY_USER,
    DataFacts,
    Machine,
    data_facts,
    derive,
    suitable_tile,
)
from s4m_d2.tiling import Tiling

GIB = 1 << 30
CPU, GPU = Machine(), Machine(24 * GIB)
USUAL = {
    "classes": 8, "height": 480, "width": 640, "long_side": 640, "short_side": 480, "labeled": 40,
    "unlabeled": 400, "validation": 10, "most_instances": 8, "instance_share": 0.05,
}  # fmt: skip


def derived(machine=CPU, options=(), explicit=None, **facts):
    """(config, derived settings, the user's), of data that differ from the usual by ``facts``."""
    cfg = load_config(str(ROOT / "configs" / "custom.yaml"), list(map(str, options)))
    cfg.defrost()
    explicit = set(map(str, options[::2])) if explicit is None else explicit
    found, kept = {}, {}
    for setting in derive(cfg, DataFacts(**USUAL | facts), machine, explicit):
        (kept if setting.reason == SET_BY_USER else found)[setting.key] = setting.value
    return cfg, found, kept


def sized(height, width):
    return {"height": height, "width": width, "long_side": max(height, width),
            "short_side": min(height, width)}  # fmt: skip


SIZES = ("INPUT.IMAGE_SIZE", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")
QUERIES = ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "TEST.DETECTIONS_PER_IMAGE")
BATCH = ("SOLVER.IMS_PER_BATCH",)
LENGTHS = ("S4M.TEACHER.MAX_ITER", "SOLVER.MAX_ITER")
SHARE, BAND = ("S4M.ARP.MIN_AREA_FRACTION",), ("S4M.PSEUDO_LABEL.COUNT_BAND",)
PERIODS = ("TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD")
TILE = {"tile": (160, "why"), "unit": "tile", **sized(160, 160)}
ONE_PIECE = ("MODEL.MASK_FORMER.TEST.LARGEST_COMPONENT",)
LARGE = Machine(80 * GIB)


FOLLOW = [
    # Views have the images' size, up to what the device can do.
    (CPU, (), sized(480, 640), SIZES, (512, 384, 512)),
    (GPU, (), sized(480, 640), SIZES, (640, 480, 640)),
    (GPU, (), sized(641, 481), SIZES, (672, 504, 672)),
    (GPU, (), sized(3000, 4000), SIZES, (1024, 768, 1024)),
    (CPU, (), sized(20, 20), SIZES, (32, 32, 32)),
    # Tiles are enlarged to what it can do.
    (CPU, (), TILE, ("INPUT.TILE.SIZE", *SIZES), (160, 192, 192, 192)),
    (GPU, (), TILE, ("INPUT.TILE.SIZE", *SIZES), (160, 512, 512, 512)),
    (CPU, ("INPUT.TILE.SIZE", 0), TILE, SIZES[:1], (160,)),
    # Queries for half as many instances again, and as many detections whatever the user sets.
    (CPU, (), {"most_instances": 66}, QUERIES, (100, 100)),
    (CPU, (), {"most_instances": 67}, QUERIES, (150, 150)),
    (CPU, (QUERIES[0], 20), {"most_instances": 156}, QUERIES, (20, 250)),
    (CPU, (QUERIES[0], 400), {"most_instances": 156}, QUERIES, (400, 400)),
    # The batch fits memory, images and processes.
    (CPU, (), {}, BATCH, (4,)),
    (CPU, (), {"labeled": 1}, BATCH, (2,)),  # ARP needs two
    (GPU, (), sized(480, 640), BATCH, (4,)),  # (0.9 * 24 - 6) / 2 / (0.5 + 2.75 * 0.41): 640 x 640
    (LARGE, (), {"labeled": 400, **sized(1024, 1024)}, BATCH, (9,)),
    (LARGE, (), {"labeled": 400, **sized(100, 100)}, BATCH, (16,)),
    (Machine(80 * GIB, 3), (), {"labeled": 400}, BATCH, (15,)),
    (Machine(24 * GIB, 4), (), {"labeled": 400, **sized(1024, 1024)}, BATCH, (8,)),
    (Machine(0, 2), (), {"labeled": 6}, BATCH, (6,)),
    # Iterations follow from counts within bounds.
    (CPU, (), {"labeled": 40, "unlabeled": 400}, LENGTHS, (300, 800)),  # the quickstart's
    (CPU, (), {"labeled": 100, "unlabeled": 5000}, LENGTHS, (750, 8000)),
    (CPU, (), {"labeled": 400, "unlabeled": 1000}, LENGTHS, (3000, 6000)),  # twice stage 1
    (GPU, (), {"labeled": 100, "unlabeled": 5000}, LENGTHS, (3750, 25_000)),
    (GPU, (), {"labeled": 20, "unlabeled": 100}, LENGTHS, (2000, 5000)),
    (GPU, (), {"labeled": 5000, "unlabeled": 5000}, LENGTHS, (90_000, 180_000)),
    (CPU, ("S4M.STAGE", "teacher"), {"unlabeled": 0}, LENGTHS[:1], (300,)),
    # Half of a usual instance is large enough to be pasted; many widen the band of counts.
    (CPU, (), {"instance_share": 0.0058}, SHARE, (0.0029,)),
    (CPU, (), {"instance_share": 0.002}, SHARE, (0.001,)),
    (CPU, (), {"most_instances": 30}, BAND, ((0.1, 60.0),)),
    (CPU, (), {"most_instances": 80}, BAND, ((0.1, 160.0),)),
    (CPU, (), {"in_one_piece": 0.985}, ONE_PIECE, (False,)),
    (CPU, (), {"in_one_piece": 0.995}, ONE_PIECE, (True,)),
    # Others follow from a user's key, which stays.
    (CPU, ("SOLVER.MAX_ITER", 8010), {}, PERIODS, (850, 850)),
    (CPU, ("SOLVER.MAX_ITER", 100), {}, LENGTHS, (100, 100)),  # stage 1's is not more
    (CPU, (BATCH[0], 2, SIZES[0], 96), {}, BATCH + SIZES, (2, 96, 72, 96)),
]


def test_settings_follow_from_machine_and_data():
    for machine, options, facts, keys, values in FOLLOW:
        cfg, settings, kept = derived(machine, options, **facts)
        found = tuple(reduce(getattr, key.split("."), cfg) for key in keys)
        assert found == values, (machine, options, facts)
        assert not set(options[::2]) & set(settings)
        assert kept == {k: v for k, v in zip(options[::2], options[1::2], strict=True) if k in kept}


def test_what_a_run_does_not_need_is_not_derived():
    assert "TEST.EVAL_PERIOD" not in derived(validation=0)[1]
    alone = derived(options=("S4M.STAGE", "teacher"), unlabeled=0)[1]
    assert not {"SOLVER.MAX_ITER", "S4M.BURN_IN", "S4M.EMA_DECAY"} & set(alone)


def test_crops_have_the_images_shape():
    options = ("INPUT.DATASET_MAPPER_NAME", "mask_former_instance")
    cfg, settings, _ = derived(GPU, options, **sized(1000, 2000))
    assert cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute"
    assert list(cfg.INPUT.CROP.SIZE) == [512, 1024]
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(512 * tenth // 10 for tenth in range(5, 21))
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (512, 1024)
    assert "INPUT.IMAGE_SIZE" not in settings


def test_small_or_many_instances_ask_for_tiles():
    """``count`` squares in a regular grid."""
    for (height, width), side, count, tile in (
        ((480, 640), 41, 30, 0),  # about an eighth
        ((480, 640), 39, 30, 288),  # 8 * 39 in steps of 32
        ((256, 256), 20, 42, 64),  # so that 12 are in a tile
        ((12_000, 12_000), 100, 50, 800),
        ((300, 300), 60, 81, 96),  # one and a half of an instance's side at least
        ((300, 300), 100, 60, 0),  # which is more than half of the image
        ((300, 300), 60, 0, 0),
    ):
        columns = math.ceil(count**0.5)
        keys = {"bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
        boxes = [
            [(i % columns) * (width - side) / columns, (i // columns) * (height - side) / columns]
            for i in range(count)
        ]
        annotations = [{"bbox": [*box, side, side], **keys} for box in boxes]
        record = {"height": height, "width": width, "annotations": annotations}
        found, reason = suitable_tile([record] * 3)
        assert found == tile and (f"{side} px" in reason) == (tile > 0)
        if tile:
            counts = [len(r["annotations"]) for r in Tiling(tile).records([record])]
            assert np.percentile(counts, 90) <= 12 or tile - 32 < 1.5 * side


def test_instances_in_one_piece_are_counted(tmp_path):
    whole, apart = np.zeros((2, 20, 30), np.uint8)
    whole[5:9, 25:] = apart[3:9, 4:8] = apart[3:9, 9:12] = 1
    polygons = [[[1, 1, 9, 1, 9, 9]], [[1, 1, 9, 1, 9, 9], [20, 1, 28, 1, 28, 9]]]
    shapes = [rle_of(whole), rle_of(apart), *polygons]
    image = {"id": 1, "file_name": "a.png", "height": 20, "width": 30}
    keys = {"image_id": 1, "category_id": 1, "bbox": [-3, 0, 30.3, 20]}  # beyond the image
    rows = [{**keys, "segmentation": shape} for shape in shapes]
    content = {"images": [image], "annotations": rows, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    labeled = read_annotations(str(tmp_path / "a.json"), str(tmp_path))
    assert data_facts(labeled, labeled, 0, 0).in_one_piece == 0.5


def test_the_teacher_follows_within_the_iterations_that_are_left():
    for options, burn_in, half_life in (
        (("SOLVER.MAX_ITER", 6000), 1000, 500),
        (("SOLVER.MAX_ITER", 6000, "MODEL.WEIGHTS", ""), 3000, 300),
        (("SOLVER.MAX_ITER", 6000, "S4M.BURN_IN", 0), 0, 600),
        (("SOLVER.MAX_ITER", 90_000), 15_000, 1733),  # the published decay at most
        (("SOLVER.MAX_ITER", 800), 300, 50),  # more than 1/6: the heads start anew
        (("SOLVER.MAX_ITER", 2), 1, 1),
    ):
        cfg, _, _ = derived(options=options)
        assert burn_in == cfg.S4M.BURN_IN
        assert cfg.S4M.EMA_DECAY**half_life == pytest.approx(0.5, abs=0.005)
        assert cfg.S4M.EMA_DECAY <= 0.9996


def test_what_a_shipped_config_sets_is_not_the_users(tmp_path):
    derivable = set()
    for mapper in ("coco_instance_lsj", "mask_former_instance"):
        options = ("INPUT.DATASET_MAPPER_NAME", mapper)
        derivable |= set(derived(options=options, most_instances=80)[1])
    for shipped in (ROOT / "configs").glob("*.yaml"):
        assert not derivable & explicit_keys(str(shipped))
        mine = tmp_path / shipped.name
        mine.write_text(f"_BASE_: {shipped}\nSOLVER: {{MAX_ITER: 7}}\n")
        found = explicit_keys(str(mine), ["TEST.EVAL_PERIOD", "0"])
        assert derivable & found == {"SOLVER.MAX_ITER", "TEST.EVAL_PERIOD"}


def test_every_derived_key_can_be_set_and_stored_as_json():
    facts = {"most_instances": 80, "tile": (96, "why")}
    first, settings, _ = derived(**facts)
    cfg, again, kept = derived(**facts, explicit=set(settings))
    assert again == {} and set(kept) == set(settings)
    other = load_config(str(ROOT / "configs" / "custom.yaml"))
    assert cfg == other
    other.defrost()
    for key, value in json.loads(json.dumps(settings)).items():
        other.merge_from_list([key, value])
    assert other == first
