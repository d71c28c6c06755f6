"""Settings from hand-made counts and sizes."""

import json
import math

import pytest
from detectron2.structures import BoxMode

from s4m_d2.engine.config_file import explicit_keys, load_config
from s4m_d2.engine.own_data.derived_settings import DataFacts, Machine, derive
from s4m_d2.engine.own_data.own_data_facts import suitable_tile
from s4m_d2.tiling import Tiling

from .conftest import ROOT

GIB = 1 << 30
CPU, GPU = Machine(), Machine(24 * GIB)
USUAL = {
    "height": 480, "width": 640, "long_side": 640, "short_side": 480, "labeled": 40,
    "unlabeled": 400, "validation": 10, "most_instances": 8, "instance_share": 0.05,
}  # fmt: skip


def derived(machine=CPU, options=(), explicit=None, **facts):
    """(config, settings by key, kept keys) of data that differ from the usual by ``facts``."""
    cfg = load_config(str(ROOT / "configs" / "custom.yaml"), list(map(str, options)))
    cfg.defrost()
    explicit = set(map(str, options[::2])) if explicit is None else explicit
    settings, kept = derive(cfg, DataFacts(**USUAL | facts), machine, explicit)
    return cfg, {setting.key: setting.value for setting in settings}, kept


def sized(height, width):
    return {"height": height, "width": width, "long_side": max(height, width),
            "short_side": min(height, width)}  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "size", "side", "test"),
    [
        (CPU, (480, 640), 512, (384, 512)),
        (GPU, (480, 640), 640, (480, 640)),
        (GPU, (641, 481), 672, (504, 672)),
        (GPU, (3000, 4000), 1024, (768, 1024)),
        (CPU, (64, 128), 128, (64, 128)),
        (CPU, (20, 20), 32, (32, 32)),
    ],
)
def test_views_have_the_images_size_up_to_what_the_device_can_do(machine, size, side, test):
    cfg, _, _ = derived(machine, **sized(*size))
    assert cfg.INPUT.IMAGE_SIZE == side
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == test


def test_crops_have_the_images_shape():
    options = ("INPUT.DATASET_MAPPER_NAME", "mask_former_instance")
    cfg, settings, _ = derived(GPU, options, **sized(1000, 2000))
    assert cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute"
    assert list(cfg.INPUT.CROP.SIZE) == [512, 1024]
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(512 * tenth // 10 for tenth in range(5, 21))
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (512, 1024)
    assert "INPUT.IMAGE_SIZE" not in settings


@pytest.mark.parametrize(
    ("size", "side", "count", "tile"),
    [
        ((480, 640), 80, 12, 0),
        ((480, 640), 41, 30, 0),  # about an eighth
        ((480, 640), 39, 30, 288),  # 8 * 39 in steps of 32
        ((256, 256), 20, 42, 160),
        ((256, 256), 8, 64, 64),
        ((12_000, 12_000), 100, 50, 800),
        ((300, 300), 60, 81, 64),  # many of usual size: so that 30 are in a tile
        ((300, 300), 60, 0, 0),
    ],
)
def test_small_or_many_instances_ask_for_tiles(size, side, count, tile):
    """``count`` squares in a regular grid."""
    height, width = size
    columns = math.ceil(count**0.5)
    boxes = [
        [(i % columns) * (width - side) / columns, (i // columns) * (height - side) / columns]
        for i in range(count)
    ]
    keys = {"bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
    annotations = [{"bbox": [*box, side, side], **keys} for box in boxes]
    record = {"height": height, "width": width, "annotations": annotations}
    found, reason = suitable_tile([record] * 3)
    assert found == tile and (f"{side} px" in reason) == (tile > 0)
    assert all(len(r["annotations"]) <= 30 for r in Tiling(tile).records([record]))


def test_tiles_are_enlarged_to_what_the_device_can_do():
    tile = {"tile": (160, "why"), "unit": "a tile", **sized(160, 160)}
    for machine, side in ((CPU, 256), (GPU, 512)):
        cfg, settings, _ = derived(machine, **tile)
        assert settings["INPUT.TILE.SIZE"] == cfg.INPUT.TILE.SIZE == 160
        assert cfg.INPUT.IMAGE_SIZE == cfg.INPUT.MIN_SIZE_TEST == cfg.INPUT.MAX_SIZE_TEST == side
    assert derived(CPU, ("INPUT.TILE.SIZE", 0), **tile)[0].INPUT.IMAGE_SIZE == 160


@pytest.mark.parametrize(
    ("most", "queries"), [(1, 100), (66, 100), (67, 150), (100, 150), (101, 200), (400, 600)]
)
def test_there_are_queries_for_half_as_many_instances_again(most, queries):
    cfg, _, _ = derived(most_instances=most)
    assert cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES == queries
    assert cfg.TEST.DETECTIONS_PER_IMAGE == queries


@pytest.mark.parametrize(("queries", "detections"), [(20, 250), (400, 400)])
def test_as_many_detections_as_instances_whatever_queries_the_user_sets(queries, detections):
    options = ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", queries)
    assert derived(options=options, most_instances=156)[0].TEST.DETECTIONS_PER_IMAGE == detections


@pytest.mark.parametrize(
    ("machine", "labeled", "size", "batch"),
    [
        (CPU, 40, (480, 640), 4),
        (CPU, 3, (480, 640), 3),
        (CPU, 1, (480, 640), 2),  # ARP needs two
        (GPU, 40, (480, 640), 2),  # (0.9 * 24 - 6) / (14 * 0.41): 640 x 640
        (Machine(80 * GIB), 400, (480, 640), 11),
        (Machine(80 * GIB), 400, (100, 100), 16),
        (Machine(80 * GIB, 4), 400, (480, 640), 16),
        (Machine(80 * GIB, 3), 400, (480, 640), 15),
        (Machine(24 * GIB, 4), 400, (480, 640), 8),
        (Machine(0, 2), 6, (480, 640), 6),
    ],
)
def test_the_batch_fits_memory_images_and_processes(machine, labeled, size, batch):
    cfg, _, _ = derived(machine, labeled=labeled, **sized(*size))
    assert cfg.SOLVER.IMS_PER_BATCH == batch
    assert batch % machine.processes == 0


@pytest.mark.parametrize(
    ("machine", "labeled", "unlabeled", "teacher", "student"),
    [
        (CPU, 40, 400, 300, 800),  # the quickstart's
        (CPU, 10, 100, 300, 800),
        (CPU, 100, 5000, 750, 8000),
        (CPU, 400, 1000, 3000, 6000),  # twice stage 1
        (GPU, 50, 5000, 3750, 50_000),
        (GPU, 20, 100, 2000, 5000),
        (GPU, 5000, 5000, 90_000, 180_000),
    ],
)
def test_iterations_follow_from_counts_within_bounds(machine, labeled, unlabeled, teacher, student):
    cfg, _, _ = derived(machine, labeled=labeled, unlabeled=unlabeled)
    assert (cfg.S4M.TEACHER.MAX_ITER, cfg.SOLVER.MAX_ITER) == (teacher, student)


@pytest.mark.parametrize(
    ("options", "burn_in", "half_life"),
    [
        (("SOLVER.MAX_ITER", 6000), 1000, 500),
        (("SOLVER.MAX_ITER", 6000, "MODEL.WEIGHTS", ""), 3000, 300),
        (("SOLVER.MAX_ITER", 6000, "S4M.BURN_IN", 0), 0, 600),
        (("SOLVER.MAX_ITER", 90_000), 15_000, 1733),  # the published decay at most
        (("SOLVER.MAX_ITER", 800), 300, 50),  # more than 1/6: the heads start anew
        (("SOLVER.MAX_ITER", 500), 250, 25),
        (("SOLVER.MAX_ITER", 2), 1, 1),
    ],
)
def test_the_teacher_follows_within_the_iterations_that_are_left(options, burn_in, half_life):
    cfg, _, _ = derived(options=options)
    assert burn_in == cfg.S4M.BURN_IN
    assert cfg.S4M.EMA_DECAY**half_life == pytest.approx(0.5, abs=0.005)
    assert cfg.S4M.EMA_DECAY <= 0.9996


@pytest.mark.parametrize(("share", "expected"), [(0.05, 0.0029), (0.0058, 0.0029), (0.002, 0.001)])
def test_half_of_a_usual_instance_is_large_enough_to_be_pasted(share, expected):
    cfg, _, _ = derived(instance_share=share)
    assert pytest.approx(expected) == cfg.S4M.ARP.MIN_AREA_FRACTION


def test_many_instances_widen_the_band_of_counts():
    assert derived(most_instances=30)[0].S4M.PSEUDO_LABEL.COUNT_BAND == (0.1, 60.0)
    assert derived(most_instances=80)[0].S4M.PSEUDO_LABEL.COUNT_BAND == (0.1, 160.0)


def test_evaluations_are_a_tenth_of_the_run_apart_and_need_a_validation_set():
    cfg, _, _ = derived(options=("SOLVER.MAX_ITER", 8010))
    assert cfg.TEST.EVAL_PERIOD == cfg.SOLVER.CHECKPOINT_PERIOD == 850
    assert "TEST.EVAL_PERIOD" not in derived(validation=0)[1]


def test_stage_one_alone_needs_no_unlabeled_images():
    cfg, settings, _ = derived(options=("S4M.STAGE", "teacher"), unlabeled=0)
    assert cfg.S4M.TEACHER.MAX_ITER == 300
    assert not {"SOLVER.MAX_ITER", "S4M.BURN_IN", "S4M.EMA_DECAY"} & set(settings)


def test_a_users_key_stays_and_others_follow_from_it():
    options = ("SOLVER.MAX_ITER", 100, "SOLVER.IMS_PER_BATCH", 2, "INPUT.IMAGE_SIZE", 96)
    cfg, settings, kept = derived(options=options)
    assert not set(options[::2]) & set(settings)
    assert set(kept) == set(options[::2])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.IMAGE_SIZE) == (100, 2, 96)
    assert cfg.S4M.TEACHER.MAX_ITER == 100  # not more than SOLVER.MAX_ITER
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (72, 96)


@pytest.mark.parametrize("shipped", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_what_a_shipped_config_sets_is_not_the_users(shipped, tmp_path):
    derivable = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES"}
    for mapper in ("coco_instance_lsj", "mask_former_instance"):
        options = ("INPUT.DATASET_MAPPER_NAME", mapper)
        derivable |= set(derived(options=options, most_instances=80)[1])
    assert not derivable & explicit_keys(str(shipped))
    mine = tmp_path / shipped.name
    mine.write_text(f"_BASE_: {shipped}\nSOLVER: {{MAX_ITER: 7}}\n")
    found = explicit_keys(str(mine), ["TEST.EVAL_PERIOD", "0"])
    assert derivable & found == {"SOLVER.MAX_ITER", "TEST.EVAL_PERIOD"}


def test_every_derived_key_can_be_set():
    facts = {"most_instances": 80, "tile": (96, "why")}
    _, settings, _ = derived(**facts)
    cfg, again, kept = derived(**facts, explicit=set(settings))
    assert again == {} and set(kept) == set(settings)
    default = load_config(str(ROOT / "configs" / "custom.yaml"))
    assert cfg == default


def test_the_settings_stay_the_same_when_they_are_stored_as_json():
    cfg, settings, _ = derived(most_instances=80, tile=(96, "why"))
    other = load_config(str(ROOT / "configs" / "custom.yaml"))
    other.defrost()
    for key, value in json.loads(json.dumps(settings)).items():
        other.merge_from_list([key, value])
    assert other == cfg
