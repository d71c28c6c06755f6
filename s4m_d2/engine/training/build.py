"""Optimizer and loaders of the two stages, from a config."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from s4m_d2.data import DATASET_MAPPER_REGISTRY, StreamLoader, labeled_dataset_names
from s4m_d2.engine.rng import derive_seed, sample_seeds
from s4m_d2.errors import ConfigError
from s4m_d2.tiling import build_tiling

logger = logging.getLogger(__name__)

# Embeddings that are bare parameters (Mask2Former's names, and those of timm's ViTs).
_EMBEDDINGS = {
    "absolute_pos_embed",
    "cls_token",
    "dist_token",
    "pos_embed",
    "reg_token",
    "relative_position_bias_table",
}
SAMPLER_SEED_BITS = 31  # Detectron2's samplers take a seed that fits a C int


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD with Mask2Former's parameter groups.

    The backbone's learning rate is multiplied by SOLVER.BACKBONE_MULTIPLIER; norm and embedding
    parameters have their own weight decay; "full_model" clips the norm of all gradients together.
    """
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "ADAMW": torch.optim.AdamW,
        "SGD": functools.partial(torch.optim.SGD, momentum=cfg.SOLVER.MOMENTUM),
    }
    if cfg.SOLVER.OPTIMIZER not in optimizers:
        raise ConfigError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; choose one of {sorted(optimizers)}."
        )
    groups = parameter_groups(cfg, model)
    optimizer = optimizers[cfg.SOLVER.OPTIMIZER](groups, lr=cfg.SOLVER.BASE_LR)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return maybe_add_gradient_clipping(cfg, optimizer)
    if clip.CLIP_VALUE > 0:
        _clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return optimizer


def _clip_full_model(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float) -> None:
    """Clip all gradients' joint norm before each step (after AMP has unscaled them)."""

    def clip(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Trainable parameters grouped by (learning rate, weight decay), each parameter once."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        in_backbone = "backbone" in module_name.split(".")
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = cfg.SOLVER.WEIGHT_DECAY
            if name in _EMBEDDINGS:
                decay = 0.0
            if _is_norm(module):
                decay = cfg.SOLVER.WEIGHT_DECAY_NORM
            if isinstance(module, nn.Embedding):
                decay = cfg.SOLVER.WEIGHT_DECAY_EMBED
            rate = cfg.SOLVER.BASE_LR * (cfg.SOLVER.BACKBONE_MULTIPLIER if in_backbone else 1.0)
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by class names: timm has some that are none of PyTorch's."""
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__)


def build_labeled_loader(
    cfg: CfgNode, start_iter: int = 0, left_out: Iterable[dict] = ()
) -> Iterable[list[dict]]:
    """The labeled stream of either stage, from iteration ``start_iter`` on, without some images."""
    names = labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    records = get_detection_dataset_dicts(
        names, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    names_out = {record["file_name"] for record in left_out}
    records = [record for record in records if record["file_name"] not in names_out]
    return _stream(
        cfg,
        "labeled",
        build_tiling(cfg).records(records, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS),
        cfg.INPUT.DATASET_MAPPER_NAME,
        cfg.DATALOADER.SAMPLER_TRAIN,
        cfg.SOLVER.IMS_PER_BATCH,
        start_iter,
    )


def build_unlabeled_loader(cfg: CfgNode, start_iter: int = 0) -> Iterable[list[dict]]:
    """The unlabeled stream of stage 2, from iteration ``start_iter`` on."""
    records = get_detection_dataset_dicts(cfg.DATASETS.UNLABELED, filter_empty=False)
    total_batch = cfg.S4M.UNLABELED_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
    if cfg.S4M.ARP.ENABLED and total_batch < 2 * comm.get_world_size():
        logger.warning(
            "S4M.ARP.ENABLED has no effect: the images of a process exchange instances, and each "
            "process has one unlabeled image a batch. Use fewer processes or a larger batch."
        )
    return _stream(
        cfg,
        "unlabeled",
        build_tiling(cfg).records(records),
        cfg.S4M.UNLABELED_MAPPER,
        cfg.S4M.UNLABELED_SAMPLER,
        total_batch,
        start_iter,
    )


def _stream(cfg, stream, records, mapper_name, sampler_name, total_batch, start_iter):
    world_size = comm.get_world_size()
    if total_batch % world_size:
        raise ConfigError(
            f"The {stream} batch of {total_batch} images cannot be divided among {world_size} "
            "processes; choose a multiple."
        )
    batch_size = total_batch // world_size
    return StreamLoader(
        records,
        DATASET_MAPPER_REGISTRY.get(mapper_name)(cfg, True),
        _build_sampler(cfg, sampler_name, stream, records),
        batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        start_position=start_iter * batch_size,
        seeds=functools.partial(sample_seeds, cfg.SEED, stream),
        max_skipped=cfg.S4M.MAX_SKIPPED_IMAGES,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )


def _build_sampler(cfg: CfgNode, name: str, stream: str, records: list[dict]):
    seed = derive_seed(cfg.SEED, stream, "order") % 2**SAMPLER_SEED_BITS
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ConfigError(
        f"The sampler {name!r} of the {stream} stream is unknown; "
        "choose TrainingSampler or RepeatFactorTrainingSampler."
    )


class PairedLoader:
    """Iterates over two loaders together: (labeled batch, unlabeled batch)."""

    def __init__(self, labeled: Iterable, unlabeled: Iterable) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled

    def __iter__(self) -> Iterator[tuple[list[dict], list[dict]]]:
        return zip(self.labeled, self.unlabeled, strict=False)
