"""Settings that cannot work are refused before anything is loaded or trained."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm

from s4m_d2.data import DATASET_MAPPER_REGISTRY
from s4m_d2.engine.checkpoint import LAST_CHECKPOINT
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.dataset_checks import check_datasets
from s4m_d2.engine.protocol import check_architecture
from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.losses.structural_distillation import DISTILLATION_REGISTRY
from s4m_d2.modeling import TRANSFORMER_DECODER_REGISTRY
from s4m_d2.sam import SAM_BACKEND_REGISTRY
from s4m_d2.sam.checkpoint import check_model_type, where_to_get
from s4m_d2.sam.sam2 import require_sam2_package
from s4m_d2.semi import REFINER_REGISTRY

__all__ = ["check_config", "check_datasets", "check_output_dir", "load_config"]

_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")
_PACKAGED_SAM = "tiny"  # the backend that needs no checkpoint


@dataclass(frozen=True)
class _Rule:
    """Keys whose values pass a test, and the words for it."""

    expected: str
    passes: Callable[[Any], bool]
    keys: tuple[str, ...]


def _ordered_pair(value: tuple[float, ...]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1]


_RULES = (
    _Rule(
        "a number from 0 to 1",
        lambda v: 0 <= v <= 1,
        (
            "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO",
            "S4M.ARP.MIN_AREA_FRACTION",
            "S4M.DISTILL.FOREGROUND_FRACTION",
            "S4M.PSEUDO_LABEL.SCORE_THRESH",
            "S4M.PSEUDO_LABEL.MASK_THRESH",
            "S4M.STRONG_VIEW.BLUR_PROB",
            "S4M.STRONG_VIEW.GRAYSCALE_PROB",
            "S4M.STRONG_VIEW.JITTER_PROB",
        ),
    ),
    _Rule("at least 0 and below 1", lambda v: 0 <= v < 1, ("S4M.EMA_DECAY",)),
    _Rule(
        "above 0, up to 0.5 (a pair has two images); S4M.ARP.ENABLED False switches ARP off",
        lambda v: 0 < v <= 0.5,
        ("S4M.ARP.PAIR_FRACTION",),
    ),
    _Rule(
        "1 or more",
        lambda v: v >= 1,
        (
            "INPUT.IMAGE_SIZE",
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
            "MODEL.MASK_FORMER.OVERSAMPLE_RATIO",
            "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            "S4M.DISTILL.NUM_POINTS",
            "S4M.REFINE.NUM_POINTS",
            "S4M.SAM.MAX_PROMPTS",
            "SOLVER.CHECKPOINT_PERIOD",
            "SOLVER.IMS_PER_BATCH",
            "SOLVER.MAX_ITER",
        ),
    ),
    _Rule("2 or more", lambda v: v >= 2, ("MODEL.MASK_FORMER.DEC_LAYERS",)),
    _Rule(
        "0 or more",
        lambda v: v >= 0,
        (
            "DATALOADER.NUM_WORKERS",
            "S4M.BURN_IN",
            "S4M.DISTILL.WEIGHT",
            "S4M.MAX_SKIPPED_IMAGES",
            "S4M.PSEUDO_LABEL.MIN_AREA",
            "S4M.TEACHER.IMS_PER_BATCH",
            "S4M.TEACHER.MAX_ITER",
            "S4M.UNLABELED_IMS_PER_BATCH",
            "S4M.UNSUP_LOSS_WEIGHT",
            "SOLVER.BACKBONE_MULTIPLIER",
            "TEST.EVAL_PERIOD",
        ),
    ),
    _Rule("above 0", lambda v: v > 0, ("S4M.DISTILL.HUBER_DELTA", "SOLVER.BASE_LR")),
    _Rule(
        "two numbers above 0, the smaller first",
        _ordered_pair,
        ("S4M.ARP.SCALE_RANGE", "S4M.STRONG_VIEW.BLUR_SIGMA"),
    ),
    _Rule(
        "four numbers of at least 0 (brightness, contrast, saturation, hue), hue up to 0.5",
        lambda v: len(v) == 4 and min(v) >= 0 and v[3] <= 0.5,
        ("S4M.STRONG_VIEW.JITTER",),
    ),
    _Rule(
        "False: the model segments instances",
        lambda v: not v,
        ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON"),
    ),
)

_CHOICES: dict[str, Iterable[Any]] = {
    "DATALOADER.SAMPLER_TRAIN": _SAMPLERS,
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.DATASET_MAPPER_NAME": DATASET_MAPPER_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": TRANSFORMER_DECODER_REGISTRY,
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": SEM_SEG_HEADS_REGISTRY,
    "S4M.DISTILL.NAME": DISTILLATION_REGISTRY,
    "S4M.EVAL": ("student", "teacher", "both"),
    "S4M.REFINE.METHOD": REFINER_REGISTRY,
    "S4M.SAM.BACKEND": SAM_BACKEND_REGISTRY,
    "S4M.STAGE": ("both", "teacher", "student"),
    "S4M.UNLABELED_MAPPER": DATASET_MAPPER_REGISTRY,
    "S4M.UNLABELED_SAMPLER": _SAMPLERS,
    "SOLVER.OPTIMIZER": ("ADAMW", "SGD"),
}


def check_config(
    cfg: CfgNode, *, eval_only: bool = False, num_processes: int | None = None
) -> None:
    """Refuse settings that are out of range, unknown or contradict each other.

    Args:
        cfg: config of a whole run, not of a stage.
        eval_only: only what evaluation needs is asked for.
        num_processes: that share a batch; default: those of this run.

    Raises:
        ConfigError: names the key, its value and what was expected.
        WeightsError: a file of weights that the run needs does not exist.
    """
    _check_values(cfg)
    _check_device(cfg)
    if not cfg.DATASETS.TEST and eval_only:
        raise ConfigError("DATASETS.TEST is empty: name the data set to evaluate on.")
    if eval_only:
        return
    if runs_stage(cfg, "student"):
        check_architecture(cfg.MODEL.META_ARCHITECTURE)
    _check_dataset_names(cfg)
    _check_stages(cfg)
    _check_batches(cfg, comm.get_world_size() if num_processes is None else num_processes)
    _check_sam(cfg)


def runs_stage(cfg: CfgNode, stage: str) -> bool:
    """Whether a run with this config trains the "teacher" (stage 1) or the "student" (stage 2)."""
    if stage == "teacher":
        return cfg.S4M.STAGE != "student" and not cfg.S4M.TEACHER_WEIGHTS
    return cfg.S4M.STAGE != "teacher"


def check_output_dir(cfg: CfgNode, *, resume: bool) -> None:
    """Refuse to write a new run over an old one.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written, or holds a run and ``resume`` is False.
    """
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be made: {error}. Choose another folder."
        ) from error
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise ConfigError(f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' is not writable; choose another folder.")
    for stage in ("teacher", "student"):
        folder = os.path.join(cfg.OUTPUT_DIR, stage)
        old = os.path.exists(os.path.join(folder, LAST_CHECKPOINT))
        if old and runs_stage(cfg, stage) and not resume:
            raise ConfigError(
                f"OUTPUT_DIR: '{folder}' holds a run already. Continue it with --resume, or "
                "choose another OUTPUT_DIR."
            )


def _get(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)


def _check_values(cfg: CfgNode) -> None:
    for rule in _RULES:
        for key in rule.keys:
            if not rule.passes(_get(cfg, key)):
                raise ConfigError(f"{key} is {_get(cfg, key)!r}; expected {rule.expected}.")
    for key, choices in _CHOICES.items():
        names = [choice if isinstance(choice, str) else choice[0] for choice in choices]
        if _get(cfg, key) not in names:
            raise ConfigError(
                f"{key} is {_get(cfg, key)!r}; choose one of {', '.join(sorted(names))}."
            )
    former = cfg.MODEL.MASK_FORMER
    if former.HIDDEN_DIM % former.NHEADS:
        raise ConfigError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM is {former.HIDDEN_DIM}; expected a multiple of "
            f"MODEL.MASK_FORMER.NHEADS, {former.NHEADS}."
        )
    if not 0 < cfg.INPUT.MIN_SCALE <= cfg.INPUT.MAX_SCALE:
        raise ConfigError(
            f"INPUT.MIN_SCALE is {cfg.INPUT.MIN_SCALE} and INPUT.MAX_SCALE {cfg.INPUT.MAX_SCALE}; "
            "expected numbers above 0, the minimum not above the maximum."
        )


def _check_device(cfg: CfgNode) -> None:
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but PyTorch finds no CUDA device here. "
            "Add MODEL.DEVICE cpu to the command, or install a PyTorch that fits the driver."
        )


def _check_dataset_names(cfg: CfgNode) -> None:
    sets = cfg.DATASETS
    if not sets.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name a labeled data set.")
    if runs_stage(cfg, "student") and not sets.UNLABELED:
        raise ConfigError(
            "DATASETS.UNLABELED is empty: stage 2 needs the name of an unlabeled data set, such as "
            "cityscapes_fine_instance_seg_train_unlabeled. (S4M.STAGE teacher runs stage 1 alone.)"
        )
    for key in ("TRAIN", "UNLABELED"):
        both = sorted(set(sets[key]) & set(sets.TEST))
        if both:
            raise ConfigError(
                f"'{both[0]}' is in DATASETS.{key} and in DATASETS.TEST: results on it would mean "
                "nothing. Remove it from one."
            )


def _check_stages(cfg: CfgNode) -> None:
    stage, weights = cfg.S4M.STAGE, cfg.S4M.TEACHER_WEIGHTS
    if stage == "teacher" and weights:
        raise ConfigError(
            f"S4M.STAGE is 'teacher' and S4M.TEACHER_WEIGHTS is '{weights}', which skips stage 1: "
            "nothing is left to train. Clear one of the two."
        )
    if stage == "student" and not weights:
        raise ConfigError(
            "S4M.STAGE is 'student', but S4M.TEACHER_WEIGHTS is empty: give the checkpoint of "
            "stage 1, such as output/teacher/model_final.pth."
        )
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise WeightsError(f"S4M.TEACHER_WEIGHTS: '{weights}' does not exist.")
    if runs_stage(cfg, "student") and cfg.S4M.BURN_IN > cfg.SOLVER.MAX_ITER:
        raise ConfigError(
            f"S4M.BURN_IN is {cfg.S4M.BURN_IN}; expected at most SOLVER.MAX_ITER, "
            f"{cfg.SOLVER.MAX_ITER}: the teacher would never follow the student."
        )


def _check_batches(cfg: CfgNode, num_processes: int) -> None:
    for key in ("SOLVER.IMS_PER_BATCH", "S4M.TEACHER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"):
        if _get(cfg, key) % num_processes:
            raise ConfigError(
                f"{key} is {_get(cfg, key)}; expected a multiple of the {num_processes} processes "
                "that share the batch."
            )


def _check_sam(cfg: CfgNode) -> None:
    distills = cfg.S4M.DISTILL.ENABLED and runs_stage(cfg, "teacher")
    refines = cfg.S4M.REFINE.ENABLED and runs_stage(cfg, "student")
    sam = cfg.S4M.SAM
    if not (distills or refines) or (sam.BACKEND == _PACKAGED_SAM and not sam.CHECKPOINT):
        return
    check_model_type(sam.BACKEND, sam.MODEL_TYPE)
    if sam.BACKEND == "sam2":
        require_sam2_package()
    if not os.path.isfile(sam.CHECKPOINT):
        needs = "S4M.DISTILL.ENABLED" if distills else "S4M.REFINE.ENABLED"
        raise WeightsError(
            f"S4M.SAM.CHECKPOINT: '{sam.CHECKPOINT}' does not exist, and {needs} needs it. "
            f"{where_to_get(sam.MODEL_TYPE)} Or set S4M.DISTILL.ENABLED False S4M.REFINE.ENABLED "
            "False to train without SAM."
        )
