"""Optimizer and loaders of the two stages, from a config."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from s4m_d2.data import DATASET_MAPPER_REGISTRY, StreamLoader, labeled_dataset_names
from s4m_d2.engine.rng import derive_seed, sample_seeds
from s4m_d2.tiling import build_tiling

logger = logging.getLogger(__name__)

# Embeddings that are bare parameters (Mask2Former's names, and those of timm's ViTs).
_EMBEDDINGS = (
    "absolute_pos_embed cls_token dist_token pos_embed reg_token relative_position_bias_table"
).split()


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW or SGD with Mask2Former's parameter groups.

    The backbone's learning rate is multiplied by SOLVER.BACKBONE_MULTIPLIER; norm and embedding
    parameters have their own weight decay; "full_model" clips the norm of all gradients together.
    """
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "ADAMW": torch.optim.AdamW,
        "SGD": functools.partial(torch.optim.SGD, momentum=cfg.SOLVER.MOMENTUM),
    }
    groups = parameter_groups(cfg, model)
    optimizer = optimizers[cfg.SOLVER.OPTIMIZER](groups, lr=cfg.SOLVER.BASE_LR)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return maybe_add_gradient_clipping(cfg, optimizer)

    def clip_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    if clip.CLIP_VALUE > 0:  # before each step, after AMP has unscaled the gradients
        optimizer.register_step_pre_hook(clip_all)
    return optimizer


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Group trainable parameters by (learning rate, weight decay), each parameter once."""
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        in_backbone = "backbone" in module_name.split(".")
        rate = solver.BASE_LR * (solver.BACKBONE_MULTIPLIER if in_backbone else 1.0)
        is_norm = any("norm" in cls.__name__.lower() for cls in type(module).__mro__)  # timm's too
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = 0.0 if name in _EMBEDDINGS else solver.WEIGHT_DECAY
            decay = solver.WEIGHT_DECAY_NORM if is_norm else decay
            decay = solver.WEIGHT_DECAY_EMBED if isinstance(module, nn.Embedding) else decay
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def labeled_names(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the labeled data sets of a run: DATASETS.TRAIN, by S4M.SPLIT_FILE or SPLIT_SEED."""
    return labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)


def build_labeled_loader(
    cfg: CfgNode, start_iter: int = 0, left_out: Iterable[dict] = ()
) -> Iterable[list[dict]]:
    """Build the labeled stream of either stage, without the images of ``left_out``'s records."""
    mapper, sampler = cfg.INPUT.DATASET_MAPPER_NAME, cfg.DATALOADER.SAMPLER_TRAIN
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    out = {record["file_name"] for record in left_out}
    records = get_detection_dataset_dicts(labeled_names(cfg), filter_empty=filter_empty)
    records = [record for record in records if record["file_name"] not in out]
    records = build_tiling(cfg).records(records, filter_empty=filter_empty)
    total = cfg.SOLVER.IMS_PER_BATCH
    return _stream(cfg, "labeled", records, mapper, sampler, total, start_iter)


def build_unlabeled_loader(cfg: CfgNode, start_iter: int = 0) -> Iterable[list[dict]]:
    """Build the unlabeled stream of stage 2."""
    records = get_detection_dataset_dicts(cfg.DATASETS.UNLABELED, filter_empty=False)
    records = build_tiling(cfg).records(records)
    mapper = cfg.S4M.UNLABELED_MAPPER
    total = cfg.S4M.UNLABELED_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
    if cfg.S4M.ARP.ENABLED and total < 2 * comm.get_world_size():
        logger.warning(
            "S4M.ARP.ENABLED has no effect: images of one process exchange instances, but each has "
            "one unlabeled image. Use fewer processes or a larger batch."
        )
    return _stream(cfg, "unlabeled", records, mapper, "TrainingSampler", total, start_iter)


def _stream(
    cfg: CfgNode,
    stream: str,
    records: list[dict],
    mapper: str,
    sampler: str,
    total_batch: int,
    start_iter: int,
) -> Iterable[list[dict]]:
    seed = derive_seed(cfg.SEED, stream, "order") % 2**31  # Detectron2's samplers take a C int
    order: Any = TrainingSampler(len(records), seed=seed)
    if sampler == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        order = RepeatFactorTrainingSampler(factors, seed=seed)
    batch_size = total_batch // comm.get_world_size()
    return StreamLoader(
        records,
        DATASET_MAPPER_REGISTRY.get(mapper)(cfg, True),
        order,
        batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        start_position=start_iter * batch_size,
        seeds=functools.partial(sample_seeds, cfg.SEED, stream),
        max_skipped=cfg.S4M.MAX_SKIPPED_IMAGES,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda"),
    )


class PairedLoader:
    """Iterates over two loaders together: (labeled batch, unlabeled batch)."""

    def __init__(self, labeled: Iterable, unlabeled: Iterable) -> None:
        self.labeled, self.unlabeled = labeled, unlabeled

    def __iter__(self) -> Iterator[tuple[list[dict], list[dict]]]:
        return zip(self.labeled, self.unlabeled, strict=False)
