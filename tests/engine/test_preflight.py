"""Settings: each that cannot work is named, and files that are no configs are refused."""

import sys
import types

import pytest

from s4m_d2.engine.checks.preflight import check_config, check_output_dir, load_config
from s4m_d2.errors import ConfigError, WeightsError

from .preflight_cases import config

# Values


def test_a_sound_config_passes():
    check_config(config(), num_processes=1)
    check_config(config({"SOLVER.IMS_PER_BATCH": 12}), num_processes=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"S4M.PSEUDO_LABEL.SCORE_THRESH": 1.5}, r"SCORE_THRESH is 1\.5; expected .* 0 to 1"),
        ({"S4M.PSEUDO_LABEL.MASK_THRESH": -0.1}, "MASK_THRESH"),
        ({"S4M.EMA_DECAY": 1.0}, r"EMA_DECAY is 1\.0; expected at least 0 and below 1"),
        ({"S4M.EMA_DECAY": -0.5}, "EMA_DECAY"),
        ({"S4M.SAM.MAX_IMAGES": -1}, "MAX_IMAGES is -1"),
        ({"S4M.SAM.PRECISION": "half"}, "PRECISION is 'half'; choose one of auto"),
        ({"S4M.REFINE.SEPL.O_S_THRESH": 2.0}, "O_S_THRESH is 2.0"),
        ({"S4M.QUALITY.SIZE_LIMITS": (9, 4)}, "SIZE_LIMITS"),
        ({"S4M.BURN_IN": 1001}, r"BURN_IN is 1001; expected at most SOLVER\.MAX_ITER, 1000"),
        ({"S4M.BURN_IN": -1}, "BURN_IN"),
        ({"S4M.ARP.PAIR_FRACTION": 0.75}, "PAIR_FRACTION"),
        ({"S4M.ARP.SCALE_RANGE": "(1.2, 0.8)"}, "the smaller first"),
        ({"S4M.STRONG_VIEW.JITTER": "(0.4, 0.4, 0.4)"}, "four numbers"),
        ({"S4M.STRONG_VIEW.JITTER": "(0.4, 0.4, 0.4, 0.6)"}, "hue up to 0.5"),
        ({"S4M.REFINE.NUM_POINTS": 0}, "NUM_POINTS is 0; expected 1 or more"),
        ({"SOLVER.IMS_PER_BATCH": 0}, "IMS_PER_BATCH is 0; expected 1 or more"),
        ({"SOLVER.IMS_PER_BATCH": 3}, "IMS_PER_BATCH is 3; expected a multiple of the 2 processes"),
        ({"S4M.UNLABELED_IMS_PER_BATCH": 5}, r"S4M\.UNLABELED_IMS_PER_BATCH is 5"),
        ({"S4M.TEACHER.IMS_PER_BATCH": 7}, r"S4M\.TEACHER\.IMS_PER_BATCH is 7"),
        ({"S4M.SAM.BACKEND": "sam3"}, "'sam3'; choose one of sam2, segment_anything, tiny"),
        ({"S4M.REFINE.METHOD": "boxes"}, "'boxes'; choose one of .*points"),
        ({"S4M.DISTILL.NAME": "none"}, "choose one of .*StructuralDistillation"),
        ({"S4M.UNLABELED_MAPPER": "Mapper"}, "choose one of .*ARPDatasetMapper"),
        ({"S4M.UNLABELED_SAMPLER": "Random"}, "choose one of RepeatFactorTrainingSampler"),
        ({"MODEL.META_ARCHITECTURE": "MaskFormer"}, "choose one of .*S4MMaskFormer"),
        ({"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FPN"}, "choose .*MSDeformAttnPixelDecoder"),
        ({"S4M.EVAL": "all"}, "'all'; choose one of both, student, teacher"),
        ({"S4M.STAGE": "first"}, "'first'; choose one of both, student, teacher"),
        ({"SOLVER.OPTIMIZER": "ADAM"}, "'ADAM'; choose one of ADAMW, SGD"),
        ({"INPUT.RANDOM_FLIP": "diagonal"}, "'diagonal'; choose none, horizontal or vertical"),
        ({"INPUT.FORMAT": "L"}, "'L'; choose one of BGR, RGB"),
        ({"MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True}, "SEMANTIC_ON is True; expected False"),
        ({"MODEL.MASK_FORMER.NHEADS": 7}, r"HIDDEN_DIM is 256; .* multiple of .*NHEADS, 7"),
        ({"INPUT.MIN_SCALE": 3.0}, r"MIN_SCALE is 3\.0 and INPUT\.MAX_SCALE 2\.0"),
        ({"DATASETS.TRAIN": ()}, r"DATASETS\.TRAIN is empty"),
        ({"DATASETS.UNLABELED": ()}, r"DATASETS\.UNLABELED is empty"),
        ({"DATASETS.TEST": ("preflight_labeled",)}, r"in DATASETS\.TRAIN and in DATASETS\.TEST"),
        ({"DATASETS.TEST": ("preflight_unlabeled",)}, r"in DATASETS\.UNLABELED and in"),
        ({"S4M.STAGE": "student"}, r"S4M\.TEACHER_WEIGHTS is empty"),
        ({"S4M.STAGE": "teacher", "S4M.TEACHER_WEIGHTS": "t.pth"}, "nothing is left to train"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config(changes), num_processes=2)


def test_stage_1_alone_needs_neither_unlabeled_images_nor_a_burn_in():
    changes = {"S4M.STAGE": "teacher", "DATASETS.UNLABELED": (), "S4M.BURN_IN": 10**6}
    check_config(config(changes), num_processes=1)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"S4M.REFINE.ENABLED": False}, True),
        ({"S4M.DISTILL.ENABLED": False}, True),
        ({"S4M.REFINE.ENABLED": False, "S4M.DISTILL.ENABLED": False}, False),
        ({"S4M.STAGE": "teacher", "S4M.DISTILL.ENABLED": False}, False),
    ],
)
def test_sams_weights_must_exist_where_they_are_needed(changes, needed):
    changes = {
        "S4M.SAM.BACKEND": "segment_anything",
        "S4M.SAM.CHECKPOINT": "nowhere/sam_vit_l.pth",
        **changes,
    }
    if not needed:
        check_config(config(changes), num_processes=1)
        return
    with pytest.raises(WeightsError, match=r"'nowhere/sam_vit_l\.pth' does not exist.*github"):
        check_config(config(changes), num_processes=1)
    check_config(config(changes), eval_only=True)


def test_sam2_is_checked_by_its_own_names(monkeypatch, tmp_path):
    changes = {"S4M.SAM.BACKEND": "sam2", "S4M.SAM.CHECKPOINT": "nowhere/sam2.pt"}
    with pytest.raises(ConfigError, match=r"MODEL_TYPE is 'vit_l'; expected one of hiera_t"):
        check_config(config(changes), num_processes=1)
    changes["S4M.SAM.MODEL_TYPE"] = "hiera_l"
    monkeypatch.setitem(sys.modules, "sam2", types.ModuleType("sam2"))
    with pytest.raises(WeightsError, match=r"'nowhere/sam2\.pt' does not exist.*sam2_hiera_large"):
        check_config(config(changes), num_processes=1)
    monkeypatch.setitem(sys.modules, "sam2", None)
    with pytest.raises(ConfigError, match="needs the package sam2"):
        check_config(config(changes), num_processes=1)
    without = {"S4M.REFINE.ENABLED": False, "S4M.DISTILL.ENABLED": False}
    check_config(config(changes | without), num_processes=1)


def test_evaluation_needs_a_test_set():
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is empty"):
        check_config(config({"DATASETS.TEST": ()}), eval_only=True)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE cpu"):
        check_config(config({"MODEL.DEVICE": "cuda"}), num_processes=1)


def test_an_old_run_is_not_written_over(tmp_path):
    cfg = config({"OUTPUT_DIR": str(tmp_path / "run")})
    check_output_dir(cfg, resume=False)
    (tmp_path / "run" / "teacher").mkdir()
    (tmp_path / "run" / "teacher" / "last_checkpoint").touch()
    with pytest.raises(ConfigError, match=r"teacher' holds a run already.*--resume"):
        check_output_dir(cfg, resume=False)
    check_output_dir(cfg, resume=True)


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="OUTPUT_DIR"):
        check_output_dir(config({"OUTPUT_DIR": str(tmp_path / "file" / "run")}), resume=False)


# Files and overrides


def test_the_file_comes_before_the_overrides_and_the_config_is_frozen(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("VERSION: 2\nS4M:\n  BURN_IN: 1\n  EMA_DECAY: 0.5\n")
    file = tmp_path / "config.yaml"
    file.write_text("_BASE_: base.yaml\nS4M:\n  BURN_IN: 2\n")
    cfg = load_config(str(file), ["S4M.UNSUP_LOSS_WEIGHT", "3.0"])
    assert (cfg.S4M.BURN_IN, cfg.S4M.EMA_DECAY, cfg.S4M.UNSUP_LOSS_WEIGHT) == (2, 0.5, 3.0)
    assert cfg.is_frozen()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["S4M.BURNIN", "3"], r"S4M\.BURNIN does not exist\. Did you mean S4M\.BURN_IN\?"),
        (["S4M.SCORE_THRESH", "0.5"], r"Did you mean S4M\.PSEUDO_LABEL\.SCORE_THRESH\?"),
        (["s4m.burn_in", "3"], r"Did you mean S4M\.BURN_IN\?"),
        (["S4M.BURN_IN", "soon"], r"Override 'S4M\.BURN_IN soon'.*Type mismatch"),
        (["S4M.BURN_IN"], r"'S4M\.BURN_IN' has no value"),
    ],
)
def test_overrides_that_do_not_fit(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_config("", opts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("S4M:\n  EMADECAY: 0.9\n", r"S4M\.EMADECAY does not exist. Did you mean S4M\.EMA_DECAY"),
        ("S4M:\n  BURN_IN: soon\n", "Type mismatch"),
        ("S4M: [1\n", "no valid YAML"),
        ("S4M: 3\n", "config.yaml"),
        ("just words\n", "config.yaml"),
        ("", "config.yaml"),
        ("S4M:\n  BURN_IN: !!python/name:os.system\n", "no tags that build objects"),
        ("_BASE_: none.yaml\n", r"none\.yaml'.*_BASE_"),
        ("_BASE_: config.yaml\n", "leads back to the file itself"),
    ],
)
def test_files_that_do_not_fit(tmp_path, content, message):
    file = tmp_path / "config.yaml"
    file.write_text(content and "VERSION: 2\n" * content.startswith(("S4M", "_BASE_")) + content)
    with pytest.raises(ConfigError, match=message):
        load_config(str(file))


def test_no_code_of_a_config_runs(tmp_path):
    proof = tmp_path / "proof"
    file = tmp_path / "config.yaml"
    file.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{proof}']\n")
    with pytest.raises(ConfigError, match="no tags that build objects"):
        load_config(str(file))
    assert not proof.exists()


def test_a_file_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"'configs/none\.yaml' does not exist"):
        load_config("configs/none.yaml")
