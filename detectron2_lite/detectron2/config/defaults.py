"""Detectron2's default config, without the keys of region-proposal detectors."""

from .config import CfgNode

# fmt: off
_MODEL = {
    "DEVICE": "cuda",
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "WEIGHTS": "",  # path or URL of a checkpoint to start from
    "PIXEL_MEAN": [103.530, 116.280, 123.675], "PIXEL_STD": [1.0, 1.0, 1.0],  # as INPUT.FORMAT
    "MASK_ON": False,
    "BACKBONE": {"NAME": "build_resnet_backbone", "FREEZE_AT": 2},  # see ResNet.freeze
    "RESNETS": {
        "DEPTH": 50,
        "OUT_FEATURES": ["res4"],
        "NORM": "FrozenBN",  # see detectron2.layers.get_norm
        "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64,
        "STRIDE_IN_1X1": True,  # True for MSRA's weights, False for torchvision's
        "RES5_DILATION": 1,
        "RES2_OUT_CHANNELS": 256,  # 64 for depth 18 and 34
        "STEM_OUT_CHANNELS": 64,
    },
    "SEM_SEG_HEAD": {
        "NAME": "SemSegFPNHead",
        "IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "IGNORE_VALUE": 255, "NUM_CLASSES": 54,
        "CONVS_DIM": 128, "COMMON_STRIDE": 4, "NORM": "GN", "LOSS_WEIGHT": 1.0,
    },
}
_INPUT = {
    "MIN_SIZE_TRAIN": (800,), "MAX_SIZE_TRAIN": 1333,  # shortest and longest edge, pixels
    "MIN_SIZE_TRAIN_SAMPLING": "choice",  # or "range"
    "MIN_SIZE_TEST": 800, "MAX_SIZE_TEST": 1333,  # 0 leaves test images as they are
    "RANDOM_FLIP": "horizontal",  # "vertical", "none"
    "CROP": {"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]},
    "FORMAT": "BGR",
    "MASK_FORMAT": "polygon",  # or "bitmask"
}
_DATALOADER = {
    "NUM_WORKERS": 4,  # for each training process
    "ASPECT_RATIO_GROUPING": True,
    "SAMPLER_TRAIN": "TrainingSampler",  # "RepeatFactorTrainingSampler", …
    "REPEAT_THRESHOLD": 0.0, "REPEAT_SQRT": True,
    "FILTER_EMPTY_ANNOTATIONS": True,
}
_SOLVER = {
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "MAX_ITER": 40000,
    "BASE_LR": 0.001, "MOMENTUM": 0.9, "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001, "WEIGHT_DECAY_NORM": 0.0,
    "GAMMA": 0.1, "STEPS": (30000,),  # iterations at which the rate is multiplied by GAMMA
    "WARMUP_FACTOR": 1.0 / 1000, "WARMUP_ITERS": 1000, "WARMUP_METHOD": "linear",
    "CHECKPOINT_PERIOD": 5000,
    "IMS_PER_BATCH": 16,  # over all processes
    "CLIP_GRADIENTS": {
        "ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0,
    },
    "AMP": {"ENABLED": False},
}
_TEST = {
    "EXPECTED_RESULTS": [],
    "EVAL_PERIOD": 0,  # iterations; 0: only at the end
    "DETECTIONS_PER_IMAGE": 100,
    "AUG": {
        "ENABLED": False, "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "MAX_SIZE": 4000, "FLIP": True,
    },
}
DEFAULTS = CfgNode({
    "VERSION": 2,
    "MODEL": _MODEL, "INPUT": _INPUT, "DATASETS": {"TRAIN": (), "TEST": ()},
    "DATALOADER": _DATALOADER, "SOLVER": _SOLVER, "TEST": _TEST,
    "OUTPUT_DIR": "./output",
    "SEED": -1,  # negative: a random seed
    "CUDNN_BENCHMARK": False,
})
