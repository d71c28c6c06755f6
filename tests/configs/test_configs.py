from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from helpers import ROOT

from s4m_d2.data import DATASET_MAPPER_REGISTRY, StrongView
from s4m_d2.engine.config_file import explicit_keys, load_config
from s4m_d2.sam.checkpoint import PUBLISHED_WEIGHTS

CONFIGS = ROOT / "configs"
ALL = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SWIN_L = ["cityscapes_10pct_swinl.yaml", "coco_10pct_swinl.yaml"]
DINO = [name for name in ALL if "_dinov" in name]


def load(name):
    cfg = load_config(str(CONFIGS / name))
    cfg.defrost()
    return cfg


def test_configs_load_safely_and_name_what_is_registered():
    for name in ALL:
        yaml.safe_load((CONFIGS / name).read_text())
        cfg = load(name)
        sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.UNLABELED, *cfg.DATASETS.TEST)
        assert set(sets) <= set(DatasetCatalog.list())
        assert cfg.MODEL.META_ARCHITECTURE == "S4MMaskFormer"
        assert cfg.MODEL.DEVICE == get_cfg().MODEL.DEVICE  # left to the command line
        assert cfg.INPUT.FORMAT == "RGB"
        DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, True)
        DATASET_MAPPER_REGISTRY.get(cfg.S4M.UNLABELED_MAPPER)(cfg, True)
        StrongView(cfg)


def test_a_key_of_earlier_runs_is_ignored(tmp_path):
    (tmp_path / "config.yaml").write_text("S4M: {UNLABELED_SAMPLER: TrainingSampler, BURN_IN: 7}")
    assert load_config(str(tmp_path / "config.yaml")).S4M.BURN_IN == 7


def test_published_settings_of_both_data_sets():
    for name in [name for name in ALL if not name.startswith(("toy", "custom"))]:
        cfg = load(name)
        solver = cfg.SOLVER
        assert (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY) == ("ADAMW", 1e-4, 0.05)
        assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY_EMBED == 0
        assert solver.BACKBONE_MULTIPLIER == 0.1
        clip = solver.CLIP_GRADIENTS
        assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.01)
        assert solver.AMP.ENABLED
        assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
        assert cfg.DATALOADER.REPEAT_THRESHOLD == 10
        assert cfg.S4M.TEACHER.SAMPLER == "TrainingSampler"
        assert cfg.S4M.UNLABELED_IMS_PER_BATCH == 0  # as many as labeled ones
        resnet = cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone"
        assert resnet == (name not in SWIN_L + DINO)
        weights = "detectron2://ImageNetPretrained/torchvision/R-50.pkl" if resnet else ""
        assert cfg.MODEL.WEIGHTS == weights
        sam = ("sam2", "hiera_l") if name.endswith("_sam2.yaml") else ("segment_anything", "vit_l")
        assert (cfg.S4M.SAM.BACKEND, cfg.S4M.SAM.MODEL_TYPE) == sam
        assert (cfg.S4M.EMA_DECAY, cfg.S4M.UNSUP_LOSS_WEIGHT) == (0.9996, 2.0)
        assert cfg.S4M.PSEUDO_LABEL.PRECISION == cfg.S4M.SAM.PRECISION == "float32"
        assert (cfg.S4M.PSEUDO_LABEL.SCORE_THRESH, cfg.S4M.PSEUDO_LABEL.MIN_AREA) == (0.7, 5)
        assert (cfg.S4M.DISTILL.NUM_POINTS, cfg.S4M.DISTILL.WEIGHT) == (128, 1)
        assert (cfg.S4M.REFINE.NUM_POINTS, cfg.S4M.ARP.PAIR_FRACTION) == (3, 0.25)
        assert cfg.S4M.DISTILL.ENABLED and cfg.S4M.REFINE.ENABLED and cfg.S4M.ARP.ENABLED
        former = cfg.MODEL.MASK_FORMER
        assert (former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT) == (2, 5, 5)
        assert (former.TRAIN_NUM_POINTS, former.OVERSAMPLE_RATIO) == (12544, 3)
        assert (former.IMPORTANCE_SAMPLE_RATIO, former.NO_OBJECT_WEIGHT) == (0.75, 0.1)
        assert former.NUM_OBJECT_QUERIES == (200 if name in SWIN_L else 100)
        assert cfg.INPUT.COLOR_AUG_SSD == ("cityscapes" in name.lower())


def test_published_settings_of_cityscapes():
    for percent in (5, 10, 20, 30):
        cfg = load(f"cityscapes_{percent}pct.yaml")
        base = "cityscapes_fine_instance_seg"
        assert cfg.DATASETS.TRAIN == (f"{base}_train_{percent}pct",)
        assert cfg.DATASETS.UNLABELED == (f"{base}_train_unlabeled",)
        assert cfg.DATASETS.TEST == (f"{base}_val_ids",)
        assert (cfg.S4M.TEACHER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH) == (4, 16)
        assert (cfg.SOLVER.MAX_ITER, cfg.S4M.BURN_IN) == (90_000, 15_000)
        assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.POLY_LR_POWER) == ("WarmupPolyLR", 0.9)
        assert cfg.INPUT.DATASET_MAPPER_NAME == "mask_former_instance"
        assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(int(1024 * tenth / 10) for tenth in range(5, 21))
        assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice"
        assert (cfg.INPUT.CROP.TYPE, tuple(cfg.INPUT.CROP.SIZE)) == ("absolute", (512, 1024))
        assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 2048)
        assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == ("SyncBN", 8)
        assert not cfg.S4M.ARP.RANDOM_PLACEMENT
        assert cfg.S4M.ARP.MIN_AREA_FRACTION * 512 * 1024 == pytest.approx(3000, rel=0.01)


def test_published_settings_of_coco():
    for percent in (1, 2, 5, 10):
        cfg = load(f"coco_{percent}pct.yaml")
        assert cfg.DATASETS.TRAIN == (f"coco_2017_train_{percent}pct",)
        assert cfg.DATASETS.UNLABELED == ("coco_2017_train_unlabeled",)
        assert cfg.DATASETS.TEST == ("coco_2017_val",)
        assert (cfg.S4M.TEACHER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH) == (16, 12)
        assert (cfg.SOLVER.MAX_ITER, cfg.S4M.BURN_IN) == (368_750, 25_000)
        assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
        assert cfg.SOLVER.STEPS == (327_778, 355_092)
        assert cfg.INPUT.DATASET_MAPPER_NAME == "coco_instance_lsj"
        assert (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE) == (1024, 0.1, 2.0)
        assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == ("FrozenBN", 80)
        assert cfg.S4M.ARP.RANDOM_PLACEMENT and tuple(cfg.S4M.ARP.SCALE_RANGE) == (0.8, 1.2)
        assert cfg.S4M.ARP.MIN_AREA_FRACTION * 1024 * 1024 == pytest.approx(3000, rel=0.02)


def test_the_override_for_sam2_changes_nothing_but_sam():
    cfg, other = load("cityscapes_10pct.yaml"), load("cityscapes_10pct_sam2.yaml")
    assert Path(other.S4M.SAM.CHECKPOINT).name in PUBLISHED_WEIGHTS["sam2"]["hiera_l"]
    cfg.S4M.SAM = other.S4M.SAM
    assert cfg == other


def test_the_quickstart_needs_no_download():
    cfg = load("toyscapes_10pct.yaml")
    assert cfg.MODEL.WEIGHTS == "" and cfg.S4M.SAM.CHECKPOINT == ""
    assert cfg.S4M.SAM.BACKEND == "tiny_toyscapes"
    assert cfg.S4M.DISTILL.ENABLED and cfg.S4M.REFINE.ENABLED and cfg.S4M.ARP.ENABLED
    assert cfg.S4M.BURN_IN < cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize("name", ["Base-Cityscapes", "Base-COCO", "toyscapes_10pct"])
def test_configs_build_and_segment_on_the_cpu(name):
    """Without SAM, whose published weights are no part of the project."""
    cfg = load(f"{name}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "S4M.DISTILL.ENABLED", False])
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        instances = model([{"image": image, "height": 32, "width": 48}])[0]["instances"]
    assert tuple(instances.pred_masks.shape[1:]) == (32, 48)
    assert instances.pred_classes.max() < cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES


def test_other_backbones_change_nothing_but_the_model():
    """And, where Mask2Former trains one for twice as many epochs, the schedule."""
    for name in SWIN_L + DINO:
        data_set = name.partition("_")[0]
        cfg, base = load(name), load(f"{data_set}_10pct.yaml")
        if name == "coco_10pct_swinl.yaml":
            base.SOLVER.MAX_ITER *= 2
            base.SOLVER.STEPS = tuple(2 * step for step in base.SOLVER.STEPS)
        for section in ("DATASETS", "DATALOADER", "INPUT", "SOLVER", "TEST", "S4M"):
            assert cfg[section] == base[section]
        assert cfg.MODEL.TIMM.PRETRAINED
        assert cfg.MODEL.TIMM.DROP_PATH == (0.3 if name in SWIN_L else 0)


LARGE = {  # configs: parameters, channels
    "cityscapes_10pct_swinl coco_10pct_swinl": (195e6, (192, 384, 768, 1536)),
    "coco_10pct_dinov2s": (22.1e6, (256,) * 4),
    "cityscapes_10pct_dinov2b coco_10pct_dinov2b": (86.6e6, (256,) * 4),
    "cityscapes_10pct_dinov3s": (21.6e6, (256,) * 4),
    "coco_10pct_dinov3b": (85.7e6, (256,) * 4),
    "cityscapes_10pct_dinov3_convnextt": (27.8e6, (96, 192, 384, 768)),
    "coco_10pct_dinov3_convnextb": (87.6e6, (128, 256, 512, 1024)),
}


@pytest.mark.parametrize("names", LARGE)
def test_the_large_backbones_build_at_full_size(names):
    """On the meta device, which needs no memory; without their weights."""
    timm = pytest.importorskip("timm")
    parameters, channels = LARGE[names]
    for name in names.split():
        cfg = load(f"{name}.yaml")
        known = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
        assert known.has_weights
        for key, values in (("PIXEL_MEAN", known.mean), ("PIXEL_STD", known.std)):
            assert cfg.MODEL[key] == pytest.approx([255 * value for value in values])
        cfg.merge_from_list(["MODEL.TIMM.PRETRAINED", False, "MODEL.DEVICE", "meta"])
        cfg.merge_from_list(["S4M.DISTILL.ENABLED", False])
        with torch.device("meta"):
            model = build_model(cfg)
        size = sum(parameter.numel() for parameter in model.backbone.net.parameters())
        assert size == pytest.approx(parameters, rel=0.01)
        shapes = model.backbone.output_shape()
        assert tuple(shape.channels for shape in shapes.values()) == channels
        crop = (512, 1024) if name.startswith("cityscapes") else (1024, 1024)
        features = model.backbone(torch.empty(1, 3, *crop, device="meta"))
        assert {key: tuple(value.shape[1:]) for key, value in features.items()} == {
            key: (shape.channels, crop[0] // shape.stride, crop[1] // shape.stride)
            for key, shape in shapes.items()
        }


@pytest.mark.parametrize("name", ["custom_small", "cityscapes_10pct"])
def test_a_name_is_the_config_that_comes_with_the_package(name, tmp_path, monkeypatch):
    path = str(CONFIGS / f"{name}.yaml")
    found = load_config(path), explicit_keys(path)
    monkeypatch.chdir(tmp_path)
    assert (load_config(name), explicit_keys(name)) == found
    (tmp_path / name).write_text("SEED: 7\n")  # a file of that name is the file
    assert load_config(name).SEED == 7
