"""Checks of settings: ranges, known names, and contradictions."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm

from s4m_d2.data import DATASET_MAPPER_REGISTRY
from s4m_d2.engine.config_file import config_items
from s4m_d2.engine.figures.figure_set import FIGURES
from s4m_d2.engine.labeling.gate import GATES, OFF
from s4m_d2.engine.labeling.pseudo_labeling import AMP, AUTO, FIXED, FLOAT32
from s4m_d2.engine.stages import runs_stage
from s4m_d2.engine.training.step import PRECISIONS
from s4m_d2.errors import ConfigError, S4MError, attempt, raise_all
from s4m_d2.semi import ARP
from s4m_d2.semi.refinement import AUTO_PROMPT, PROMPTS

_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")

# Ranges of keys that the parts built by the checks do not verify.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    """
    MODEL.MASK_FORMER.TEST.DUPLICATE_IOU
    S4M.PSEUDO_LABEL.DUPLICATE_IOU S4M.PSEUDO_LABEL.DUPLICATE_OVERLAP
    S4M.PSEUDO_LABEL.MASK_QUALITY_THRESH
    S4M.PSEUDO_LABEL.SCORE_THRESH S4M.REFINE.SEPL.BOX_NMS_THRESH
    S4M.REFINE.SEPL.O_P_THRESH S4M.REFINE.SEPL.O_S_THRESH
    S4M.REFINE.SEPL.PRED_IOU_THRESH S4M.REFINE.SEPL.STABILITY_SCORE_THRESH
    S4M.STRONG_VIEW.BLUR_PROB S4M.STRONG_VIEW.GRAYSCALE_PROB S4M.STRONG_VIEW.JITTER_PROB
    """: ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "S4M.PSEUDO_LABEL.MASK_THRESH": ("above 0 and below 1", lambda v: 0 < v < 1),
    "INPUT.TILE.OVERLAP S4M.EMA_DECAY": ("at least 0 and below 1", lambda v: 0 <= v < 1),
    """
    INPUT.IMAGE_SIZE MODEL.MASK_FORMER.NUM_OBJECT_QUERIES MODEL.SEM_SEG_HEAD.NUM_CLASSES
    S4M.FIGURES.IMAGES S4M.REFINE.SEPL.POINTS_PER_SIDE SOLVER.CHECKPOINT_PERIOD
    SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER
    """: ("1 or more", lambda v: v >= 1),
    """
    DATALOADER.NUM_WORKERS INPUT.TILE.SIZE S4M.BURN_IN S4M.DISTILL.WEIGHT S4M.FIGURES.PERIOD
    S4M.FINETUNE.BASE_LR S4M.FINETUNE.MAX_ITER
    S4M.MAX_BAD_STEPS S4M.MAX_SKIPPED_IMAGES S4M.PSEUDO_LABEL.COUNT_BAND_ITERS
    S4M.PSEUDO_LABEL.MIN_AREA S4M.QUALITY.MAX_IMAGES S4M.QUALITY.PERIOD
    S4M.REFINE.SEPL.MIN_MASK_REGION_AREA S4M.TEACHER.IMS_PER_BATCH S4M.TEACHER.MAX_ITER
    S4M.UNLABELED_IMS_PER_BATCH S4M.UNSUP_LOSS_WEIGHT SOLVER.BACKBONE_MULTIPLIER
    SOLVER.CHECKPOINT_KEEP TEST.EVAL_PERIOD
    """: ("0 or more", lambda v: v >= 0),
    "SOLVER.BASE_LR": ("above 0", lambda v: v > 0),
    "S4M.PSEUDO_LABEL.COUNT_BAND": (
        "two numbers of at least 0, the smaller first",
        lambda v: len(v) == 2 and 0 <= v[0] <= v[1],
    ),
    "S4M.STRONG_VIEW.BLUR_SIGMA": (
        "two numbers above 0, the smaller first",
        lambda v: len(v) == 2 and 0 < v[0] <= v[1],
    ),
    "S4M.STRONG_VIEW.JITTER": (
        "four numbers of at least 0 (brightness, contrast, saturation, hue), hue up to 0.5",
        lambda v: len(v) == 4 and min(v) >= 0 and v[3] <= 0.5,
    ),
    "S4M.FIGURES.WHAT": (f"some of {', '.join(FIGURES)}", lambda v: set(v) <= set(FIGURES)),
}

_CHOICES: dict[str, Iterable[Any]] = {
    "DATALOADER.SAMPLER_TRAIN": _SAMPLERS,
    "INPUT.FORMAT": ("RGB", "BGR"),
    "INPUT.DATASET_MAPPER_NAME": DATASET_MAPPER_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
    "S4M.AMP_PRECISION": PRECISIONS,
    "S4M.EVAL": ("student", "teacher", "both"),
    "S4M.PSEUDO_LABEL.CLASS_THRESH": (FIXED, AUTO),
    "S4M.PSEUDO_LABEL.PRECISION": (AMP, FLOAT32),
    "S4M.REFINE.GATE": GATES,
    "S4M.REFINE.PROMPT": (*PROMPTS, AUTO_PROMPT),
    "S4M.STAGE": ("both", "teacher", "student"),
    "S4M.TEACHER.SAMPLER": _SAMPLERS,
    "S4M.UNLABELED_MAPPER": DATASET_MAPPER_REGISTRY,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "norm", "value"),
    "SOLVER.OPTIMIZER": ("ADAMW", "SGD"),
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
}


def check_config(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Raise one S4MError for all of :func:`config_errors`."""
    raise_all(config_errors(cfg, eval_only=eval_only, num_processes=comm.get_world_size()))


def config_errors(
    cfg: CfgNode, *, eval_only: bool = False, num_processes: int = 1
) -> list[S4MError]:
    """Errors of settings of a whole run that are out of range, unknown or contradict each other.

    Neither data nor weights are read. SAM's settings are checked where it is built.
    ``num_processes`` share a batch.
    """
    errors: list[S4MError] = [*value_errors(cfg)]
    if eval_only:
        if not cfg.DATASETS.TEST:
            errors.append(ConfigError("DATASETS.TEST is empty: name a data set, or give --val."))
        return errors
    errors += _training_errors(cfg, num_processes)
    if errors:
        return errors
    try:  # parts that need neither data nor SAM are built
        build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    except ValueError as error:
        errors.append(ConfigError(f"SOLVER.LR_SCHEDULER_NAME: {error}"))
    mappers = [cfg.INPUT.DATASET_MAPPER_NAME]
    if runs_stage(cfg, "student"):
        mappers.append(cfg.S4M.UNLABELED_MAPPER)
        errors += attempt(ARP, cfg)[1] if cfg.S4M.ARP.ENABLED else []
    found = (attempt(DATASET_MAPPER_REGISTRY.get(name), cfg, True)[1] for name in mappers)
    return errors + next(filter(None, found), [])  # both mappers usually have the same error


def value_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """Errors of settings that are out of range or unknown, whatever they are used for."""
    values = config_items(cfg)
    for keys, (expected, passes) in _RULES.items():
        for key in keys.split():
            if not passes(values[key]):
                yield ConfigError(f"{key} is {values[key]!r}; expected {expected}.")
    for key, choices in _CHOICES.items():
        names = sorted(choice if isinstance(choice, str) else choice[0] for choice in choices)
        if values[key] not in names:
            yield ConfigError(f"{key} is {values[key]!r}; choose one of {', '.join(names)}.")
    if cfg.S4M.REFINE.PROMPT == AUTO_PROMPT and cfg.S4M.REFINE.GATE == OFF:
        yield ConfigError(
            "S4M.REFINE.PROMPT is 'auto', which needs S4M.REFINE.GATE: set it to 'warn' or 'auto'."
        )
    if not 0 < cfg.INPUT.MIN_SCALE <= cfg.INPUT.MAX_SCALE:
        scales = f"INPUT.MIN_SCALE is {cfg.INPUT.MIN_SCALE}, MAX_SCALE {cfg.INPUT.MAX_SCALE}"
        yield ConfigError(f"{scales}; expected numbers above 0, the smaller first.")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        yield ConfigError(f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}'; expected cpu, cuda or cuda:1.")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        yield ConfigError(
            f"MODEL.DEVICE is '{cfg.MODEL.DEVICE}', but PyTorch finds no CUDA device here. "
            "Add MODEL.DEVICE cpu to the command, or install a PyTorch that fits the driver."
        )


def _training_errors(cfg: CfgNode, processes: int) -> Iterator[S4MError]:
    """Rules between data sets, stages, lengths and batches."""
    weights, with_student = cfg.S4M.TEACHER_WEIGHTS, runs_stage(cfg, "student")
    if not cfg.DATASETS.TRAIN:
        yield ConfigError("DATASETS.TRAIN is empty: name a labeled data set, or give --labeled.")
    if with_student and not cfg.DATASETS.UNLABELED:
        yield ConfigError(
            "DATASETS.UNLABELED is empty: name an unlabeled data set, or give --unlabeled. "
            "(S4M.STAGE teacher runs stage 1 alone.)"
        )
    if cfg.S4M.STAGE == "teacher" and weights:
        yield ConfigError(
            f"S4M.STAGE is 'teacher' and S4M.TEACHER_WEIGHTS is '{weights}', which skips stage 1: "
            "nothing is left to train. Clear one of the two."
        )
    if cfg.S4M.STAGE == "student" and not weights:
        yield ConfigError(
            "S4M.STAGE is 'student', but S4M.TEACHER_WEIGHTS is empty: give the checkpoint of "
            "stage 1, such as output/teacher/model_final.pth."
        )
    if with_student and cfg.S4M.BURN_IN > cfg.SOLVER.MAX_ITER:
        yield ConfigError(
            f"S4M.BURN_IN is {cfg.S4M.BURN_IN}; expected at most SOLVER.MAX_ITER, "
            f"{cfg.SOLVER.MAX_ITER}: the teacher would never follow the student."
        )
    values = config_items(cfg)
    for key in ("MODEL.RESNETS.NORM", "MODEL.TIMM.NORM"):
        if processes > 1 and values[key] == "SyncBN" and not cfg.MODEL.DEVICE.startswith("cuda"):
            yield ConfigError(f"{key} is SyncBN, which needs GPUs; expected BN or FrozenBN.")
    for key in ("SOLVER.IMS_PER_BATCH", "S4M.TEACHER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"):
        if values[key] % processes:
            expected = f"expected a multiple of the {processes} processes that share the batch."
            yield ConfigError(f"{key} is {values[key]}; {expected}")
