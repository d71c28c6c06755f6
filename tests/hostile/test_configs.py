"""Config files and overrides that cannot be read, do not fit, or contradict themselves."""

import os

import pytest

from s4m_d2.engine.checks.preflight import check_config
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError

from .rows import one_error


def touching(path):
    return f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{path}']\n"


FILES = {
    "empty": (b"", ""),
    "a list": (b"- S4M\n- MODEL\n", ""),
    "binary": (bytes(range(256)), "no (text|valid)"),
    "UTF-16": ("S4M:\n  BURN_IN: 3\n".encode("utf-16-le"), ""),
    "open bracket": (b"VERSION: 2\nS4M: [1\n", "no valid YAML"),
    "tab indent": (b"VERSION: 2\nS4M:\n\tBURN_IN: 3\n", "no valid YAML"),
    "unknown anchor": (b"VERSION: 2\nS4M: *none\n", "no valid YAML"),
    "nested too deep": (b"VERSION: 2\nS4M: " + b"[" * 600, ""),
    "another version": (b"VERSION: 99\n", "99"),
    "unknown section": (b"VERSION: 2\nS5M:\n  BURN_IN: 3\n", "S5M does not exist"),
    "unknown key": (b"VERSION: 2\nS4M:\n  EMADECAY: 0.9\n", r"Did you mean S4M\.EMA_DECAY\?"),
    "section is a number": (b"VERSION: 2\nS4M: 3\n", "S4M"),
    "section is null": (b"VERSION: 2\nS4M:\n", "S4M"),
    "number is text": (b"VERSION: 2\nS4M:\n  BURN_IN: soon\n", "S4M.BURN_IN|Type mismatch"),
    "flag is text": (b"VERSION: 2\nS4M:\n  REFINE:\n    ENABLED: maybe\n", "Type mismatch"),
    "names are a number": (b"VERSION: 2\nDATASETS:\n  TRAIN: 3\n", "Type mismatch"),
    "class of Python": (b"VERSION: 2\nOUTPUT_DIR: !!python/name:os.system\n", "no tags that build"),
    "_BASE_ missing": (b"_BASE_: none.yaml\n", r"none\.yaml'.*_BASE_"),
    "_BASE_ is a folder": (b"_BASE_: .\n", "_BASE_"),
    "_BASE_ is itself": (b"_BASE_: config.yaml\n", "leads back to the file itself"),
    "_BASE_ cycle": (b"_BASE_: other.yaml\n", "leads back to the file itself"),
    "_BASE_ is a number": (b"_BASE_: 3\n", ""),
}


@pytest.mark.parametrize("row", FILES)
def test_files_are_refused_and_named(tmp_path, row):
    content, says = FILES[row]
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    (tmp_path / "other.yaml").write_text("_BASE_: config.yaml\n")
    with one_error(ConfigError, r"Config file '.*config\.yaml'", says):
        load_config(str(path))


@pytest.mark.parametrize("through_base", [False, True])
def test_no_code_of_a_file_runs(tmp_path, through_base):
    proof = tmp_path / "proof"
    (tmp_path / "base.yaml").write_text(touching(proof))
    path = tmp_path / "config.yaml"
    path.write_text("_BASE_: base.yaml\n" if through_base else touching(proof))
    with one_error(ConfigError, r"config\.yaml", "no tags that build objects"):
        load_config(str(path))
    assert not proof.exists()


@pytest.mark.parametrize("make", [None, os.mkdir])
def test_paths_that_are_no_files_are_refused_and_named(tmp_path, make):
    path = tmp_path / "config.yaml"
    if make:
        make(path)
    with one_error(ConfigError, rf"Config file '{path}' does not exist"):
        load_config(str(path))


OVERRIDES = {
    "unknown key": (["S4M.BURNIN", "3"], r"S4M\.BURNIN does not exist\. Did you mean S4M\.BURN_IN"),
    "lower case": (["s4m.burn_in", "3"], r"Did you mean S4M\.BURN_IN\?"),
    "below a value": (["S4M.BURN_IN.FROM", "3"], "S4M.BURN_IN.FROM 3"),
    "empty key": (["", "3"], "Override ' 3'"),
    "equals sign": (["S4M.BURN_IN=3", "4"], "S4M.BURN_IN=3"),
    "odd number": (["S4M.BURN_IN", "3", "S4M.EMA_DECAY"], "'S4M.EMA_DECAY' has no value"),
    "text for a number": (["S4M.BURN_IN", "soon"], "S4M.BURN_IN soon'.*Type mismatch"),
    "number for a section": (["S4M", "3"], "Override 'S4M 3'"),
    "section for a number": (["S4M.BURN_IN", "{'FROM': 3}"], "Type mismatch"),
    "list of numbers for names": (["DATASETS.TRAIN", "3"], "Type mismatch"),
}


@pytest.mark.parametrize("row", OVERRIDES)
def test_overrides_are_refused_and_named(row):
    words, says = OVERRIDES[row]
    with one_error(ConfigError, says):
        load_config("", words)


SOUND = {
    "MODEL.DEVICE": "cpu",
    "MODEL.META_ARCHITECTURE": "S4MMaskFormer",
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "INPUT.FORMAT": "RGB",
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
    "DATASETS.TRAIN": ("toyscapes_train_10pct",),
    "DATASETS.UNLABELED": ("toyscapes_train_unlabeled",),
    "DATASETS.TEST": ("toyscapes_val",),
    "S4M.SAM.BACKEND": "tiny_toyscapes",
    "S4M.SAM.CHECKPOINT": "",
}
CONTRADICTIONS = {
    "burn-in beyond the end": ({"S4M.BURN_IN": 50_000, "SOLVER.MAX_ITER": 100}, "BURN_IN is 50000"),
    "stage 1 that is skipped": (
        {"S4M.STAGE": "teacher", "S4M.TEACHER_WEIGHTS": "t.pth"}, "nothing is left to train"),
    "stage 2 without a teacher": ({"S4M.STAGE": "student"}, "TEACHER_WEIGHTS is empty"),
    "trained and tested": ({"DATASETS.TEST": ("toyscapes_train_10pct",)}, "TRAIN and in .*TEST"),
    "unlabeled and tested": ({"DATASETS.TEST": ("toyscapes_train_unlabeled",)}, "UNLABELED and in"),
    "no unlabeled set": ({"DATASETS.UNLABELED": ()}, "DATASETS.UNLABELED is empty"),
    "no labeled set": ({"DATASETS.TRAIN": ()}, "DATASETS.TRAIN is empty"),
    "heads that do not divide": ({"MODEL.MASK_FORMER.NHEADS": 7}, "multiple of .*NHEADS, 7"),
    "smallest above largest": ({"INPUT.MIN_SCALE": 3.0}, "minimum not above the maximum"),
    "batch of processes": ({"SOLVER.IMS_PER_BATCH": 3}, "a multiple of the 2 processes"),
    "SAM of another backend": (
        {"S4M.SAM.BACKEND": "segment_anything", "S4M.SAM.MODEL_TYPE": "hiera_l"}, "vit_b, vit_l"),
    "range turned around": ({"S4M.STRONG_VIEW.BLUR_SIGMA": "(2.0, 0.1)"}, "the smaller first"),
    "decay of 1": ({"S4M.EMA_DECAY": 1.0}, "EMA_DECAY is 1.0; expected at least 0 and below 1"),
    "negative batch": ({"SOLVER.IMS_PER_BATCH": -2}, "IMS_PER_BATCH is -2; expected 1 or more"),
    "score of 70": ({"S4M.PSEUDO_LABEL.SCORE_THRESH": 70.0}, "SCORE_THRESH is 70.0; expected"),
    "score of 1e999": ({"S4M.PSEUDO_LABEL.SCORE_THRESH": "1e999"}, "SCORE_THRESH is inf; expected"),
}  # fmt: skip


@pytest.mark.parametrize("row", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused_and_named(row):
    changes, says = CONTRADICTIONS[row]
    words = [str(word) for pair in (SOUND | changes).items() for word in pair]
    with one_error(ConfigError, says):
        check_config(load_config("", words), num_processes=2)


def test_the_sound_settings_pass():
    words = [str(word) for pair in SOUND.items() for word in pair]
    check_config(load_config("", words), num_processes=2)
