"""A sound config for the tests of the checks before training."""

from s4m_d2.engine.config_file import load_config

CLASSES = ["person", "car"]
VALID = {
    "MODEL.DEVICE": "cpu",
    "MODEL.META_ARCHITECTURE": "S4MMaskFormer",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": len(CLASSES),
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": (24,),
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": (24, 24),
    "DATASETS.TRAIN": ("preflight_labeled",),
    "DATASETS.UNLABELED": ("preflight_unlabeled",),
    "DATASETS.TEST": ("preflight_test",),
    "S4M.SAM.BACKEND": "tiny",
    "S4M.SAM.CHECKPOINT": "",
    "S4M.BURN_IN": 100,
    "SOLVER.MAX_ITER": 1000,
}


def config(changes=None, file=""):
    settings = VALID | (changes or {})
    return load_config(file, [str(word) for item in settings.items() for word in item])
