"""A sound config for the tests of the checks before training."""

from helpers import key_values

from s4m_d2.engine.config_file import load_config

CLASSES = ["person", "car"]
VALID = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(CLASSES),
    "INPUT.MIN_SIZE_TRAIN": (24,),
    "INPUT.CROP.SIZE": (24, 24),
    "DATASETS.TRAIN": ("preflight_labeled",),
    "DATASETS.UNLABELED": ("preflight_unlabeled",),
    "DATASETS.TEST": ("preflight_test",),
    "S4M.BURN_IN": 100,
    "SOLVER.MAX_ITER": 1000,
}


def config(changes=None):
    return load_config("toyscapes_10pct", key_values(VALID | (changes or {})))
