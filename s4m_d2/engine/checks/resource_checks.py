"""Weights fit the models that will load them; a run's files fit on the disk, its models in memory.

Models are built without values (blueprints), and of files of weights names and shapes are read.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checkpointing.checkpoint_files import holds_run
from s4m_d2.engine.checkpointing.weight_names import ClassLists
from s4m_d2.engine.checks.config_checks import needs_sam, sam_errors
from s4m_d2.engine.checks.findings import Finding, in_units, raise_all
from s4m_d2.engine.own_data.derived_settings import activation_bytes
from s4m_d2.engine.own_data.own_data_files import class_lists
from s4m_d2.engine.stages import STAGES, final_weights, runs_stage, stage_config
from s4m_d2.errors import ConfigError, S4MError
from s4m_d2.losses.structural_distillation import build_distillation
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.semi import build_refiner

_Built = TypeVar("_Built")
_OPTIMIZER_COPIES = {"ADAMW": 2, "SGD": 1}  # tensors of a trained parameter's size in its state


def model_blueprint(cfg: CfgNode) -> nn.Module:
    """The model of a run with names and shapes, and without values or SAM.

    Raises:
        S4MError: as building the model does.
    """

    def build(cfg: CfgNode) -> nn.Module:
        cfg.S4M.DISTILL.ENABLED = False  # it would build SAM
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)

    return _blueprint(cfg, build)


def sam_blueprint(cfg: CfgNode) -> SamBackend:
    """The SAM of a run, its file checked, without values where it can be built so.

    Raises:
        S4MError: as building the backend, or a part that consults it, does.
    """

    def build(cfg: CfgNode) -> SamBackend:
        backend = build_sam_backend(cfg)
        if needs_sam(cfg, "teacher"):
            build_distillation(cfg, backend)
        if needs_sam(cfg, "student"):
            build_refiner(cfg, backend)
        return backend

    return _blueprint(cfg, build)


def _blueprint(cfg: CfgNode, build: Callable[[CfgNode], _Built]) -> _Built:
    """What ``build`` makes of a copy; what cannot be built without values is built with them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False

    def built(device: str) -> _Built:
        cfg.MODEL.DEVICE = device
        with torch.device(device):
            return build(cfg)

    with torch.random.fork_rng(devices=[]):
        try:
            return built("meta")  # PyTorch's device of tensors without values
        except RuntimeError:  # it computes with values while it is built
            return built("cpu")


def bytes_of(module: nn.Module, *, trainable: bool = False) -> int:
    """Bytes of a module's parameters and buffers, or of the trainable parameters alone."""
    tensors = (*module.parameters(), *module.buffers())
    used = [tensor for tensor in tensors if tensor.requires_grad or not trainable]
    return sum(tensor.numel() * tensor.element_size() for tensor in used)


def sam_bytes(backend: SamBackend | None) -> int:
    """Bytes of the modules that a backend holds, of which some are parts of others."""
    parts = vars(backend).values() if backend is not None else ()
    return bytes_of(nn.ModuleList([part for part in parts if isinstance(part, nn.Module)]))


def model_finding(
    cfg: CfgNode, settings_are_right: bool = True
) -> tuple[nn.Module | None, Finding]:
    """The model without values, None where it cannot be built; the line of a report.

    Of wrong settings none is built: it may be another than will be meant.
    """
    if not settings_are_right:
        text = "not built before the settings are right"
        return None, Finding("model", text, checked=False)
    try:
        model = model_blueprint(cfg)
    except S4MError as error:
        return None, Finding("model", "cannot be built", [error])
    count = sum(parameter.numel() for parameter in model.parameters())
    text = f"{cfg.MODEL.META_ARCHITECTURE}, {count / 1e6:.1f} million parameters"
    return model, Finding("model", text)


def sam_finding(cfg: CfgNode, settings_are_right: bool = True) -> tuple[SamBackend | None, Finding]:
    """SAM without values, None where it is not needed or cannot be built; the line of a report.

    Where settings are wrong, SAM's file is looked for only.
    """
    if not any(needs_sam(cfg, stage) for stage in STAGES):
        return None, Finding("SAM", "not used")
    sam, errors = None, sam_errors(cfg)
    if settings_are_right and not errors:
        try:
            sam = sam_blueprint(cfg)
        except S4MError as error:
            errors.append(error)
    text = f"{cfg.S4M.SAM.BACKEND}, {cfg.S4M.SAM.CHECKPOINT or 'the packaged weights'}"
    text += f" ({in_units(sam_bytes(sam))})" if sam is not None else ""
    return sam, Finding("SAM", text, errors, checked=settings_are_right)


def weight_findings(
    cfg: CfgNode, model: nn.Module | None, stages: Sequence[str], *, resume: bool
) -> Iterator[Finding]:
    """Lines on MODEL.WEIGHTS, and on the models of earlier stages that later ones start with.

    Args:
        cfg: of a whole run.
        model: of :func:`model_blueprint`; without one, only the files' existence is checked.
        stages: that will be trained.
        resume: a stage with a checkpoint continues from it and needs no other weights.
    """
    begun = {stage: holds_run(stage_config(cfg, stage).OUTPUT_DIR) for stage in stages}
    path, timm = cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM
    if resume and all(begun[stage] for stage in stages if stage != "finetune"):
        yield Finding("first weights", "not needed: every stage continues from its checkpoint")
    elif path:
        yield _file_finding("first weights", model, path, class_lists(cfg))
    elif timm.PRETRAINED and cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        yield Finding("first weights", f"timm's of {timm.NAME}, read when training starts")
    else:
        yield Finding("first weights", "MODEL.WEIGHTS is empty: training starts from scratch")
    for number, (earlier, later) in enumerate(itertools.pairwise(STAGES), start=1):
        if later not in stages or (later == "finetune" and resume and begun[later]):
            continue
        given = cfg.S4M.TEACHER_WEIGHTS if earlier == "teacher" else ""
        if not given and earlier in stages:
            yield Finding(earlier, f"made by stage {number} of this run")
        else:
            yield _file_finding(earlier, model, given or final_weights(cfg, earlier))


def _file_finding(
    item: str, model: nn.Module | None, path: str, classes: ClassLists = ((), ())
) -> Finding:
    if model is None and ("://" in path or os.path.isfile(path)):
        return Finding(item, f"{path}: compared when the model can be built", checked=False)
    model = nn.Module() if model is None else model  # without one, there is no file either
    checkpointer = S4MCheckpointer(model, classes=classes)
    try:
        branch = "student" if item == "student" else "teacher"
        report = checkpointer.inspect(path, branch=branch, require=item in STAGES)
    except S4MError as error:
        return Finding(item, path, [error])
    text = f"{path}: {len(report.matched)} of the model's {len(model.state_dict())} tensors"
    warning = f"{report}. If this is not meant, use the config that the file was trained with."
    return Finding(item, text, (), [warning] if report.is_surprising else [])


def check_output_dir(cfg: CfgNode, *, resume: bool) -> None:
    """Refuse to write a new run over an old one; make the folder.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written, or holds a run and ``resume`` is False.
    """
    raise_all(output_dir_errors(cfg, resume=resume))
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be made: {error}. Choose another folder."
        ) from error


def output_dir_errors(cfg: CfgNode, *, resume: bool) -> Iterator[S4MError]:
    """The same, without making anything."""
    parent = existing_parent(cfg.OUTPUT_DIR)
    is_folder = os.path.isdir(parent)
    if not is_folder or not os.access(parent, os.W_OK | os.X_OK):
        yield ConfigError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be made: '{parent}' "
            f"{'is not writable' if is_folder else 'is a file'}. Choose another folder."
        )
    for stage in STAGES:
        folder = stage_config(cfg, stage).OUTPUT_DIR
        if os.path.lexists(folder) and not os.path.isdir(folder):
            yield ConfigError(
                f"OUTPUT_DIR: '{folder}' is a file, where the stage's folder has to be. Move it "
                "away, or choose another OUTPUT_DIR."
            )
        if holds_run(folder) and runs_stage(cfg, stage) and not resume:
            yield ConfigError(
                f"OUTPUT_DIR: '{folder}' holds a run already. Continue it with --resume, or "
                "choose another OUTPUT_DIR."
            )


def existing_parent(path: str) -> str:
    """The path itself, or the nearest folder above it that exists."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def checkpoint_bytes(cfg: CfgNode, stage: str, model: nn.Module) -> int:
    """About how many bytes a stage keeps: its models' and the optimizer's state, a teacher in 2.

    Args:
        cfg: of the run or of the stage.
        stage: one of STAGES.
        model: also without values (:func:`model_blueprint`).
    """
    models = 2 if stage == "student" else 1
    copies = _OPTIMIZER_COPIES[cfg.SOLVER.OPTIMIZER]
    return models * bytes_of(model) + copies * bytes_of(model, trainable=True)


def kept_checkpoints(cfg: CfgNode) -> int:
    """How many files a stage, of which this is the config, has at most: periodic and the last."""
    periodic = cfg.SOLVER.MAX_ITER // cfg.SOLVER.CHECKPOINT_PERIOD
    kept = cfg.SOLVER.CHECKPOINT_KEEP  # 0: all; a new one is written before one goes
    return (min(periodic, kept) if kept else periodic) + 1


def disk_finding(cfg: CfgNode, model: nn.Module, stages: Sequence[str]) -> Finding:
    """Whether the checkpoints of the stages to run fit into what is free."""
    largest = needed = 0
    parts = []
    for stage in stages:
        of_stage = stage_config(cfg, stage)
        size, count = checkpoint_bytes(of_stage, stage, model), kept_checkpoints(of_stage)
        parts.append(f"{count} x {in_units(size)} ({stage})")
        there = sum(file.stat().st_size for file in Path(of_stage.OUTPUT_DIR).glob("*.pth"))
        largest, needed = max(largest, size), needed + count * size - there
    folder = existing_parent(cfg.OUTPUT_DIR)
    free = shutil.disk_usage(folder).free
    text = f"checkpoints {' + '.join(parts) or 'none'}; {in_units(free)} free"
    if largest > free:
        error = ConfigError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}': one checkpoint has about {in_units(largest)}, and "
            f"'{folder}' has {in_units(free)} free. Free space, or choose an OUTPUT_DIR on another "
            "disk."
        )
        return Finding("disk", text, [error])
    warning = (
        f"OUTPUT_DIR '{cfg.OUTPUT_DIR}': the checkpoints still to come have about "
        f"{in_units(needed)}, and '{folder}' has {in_units(free)} free. Free space, choose an "
        "OUTPUT_DIR on another disk, or raise SOLVER.CHECKPOINT_PERIOD "
        f"({cfg.SOLVER.CHECKPOINT_PERIOD}) or set SOLVER.CHECKPOINT_KEEP (0: all are kept)."
    )
    return Finding("disk", text, (), [warning] if needed > free else [])


def stage_memory(
    cfg: CfgNode, stage: str, model: nn.Module, sam: SamBackend | None, num_processes: int = 1
) -> int:
    """Bytes that one process of a stage holds in any case, before any image.

    What a checkpoint has, gradients (twice with several processes: DDP's buckets), and SAM where
    the stage consults it. Not: activations, images, and what PyTorch itself needs.
    """
    size = checkpoint_bytes(cfg, stage, model)
    size += bytes_of(model, trainable=True) * (2 if num_processes > 1 else 1)
    return size + (sam_bytes(sam) if needs_sam(cfg, stage) else 0)


def step_bytes(cfg: CfgNode, stage: str, num_processes: int = 1) -> int:
    """Bytes of activations of one process's step of a stage on a GPU: an estimate.

    Args:
        cfg: of the stage.
    """
    images = cfg.SOLVER.IMS_PER_BATCH
    images += (cfg.S4M.UNLABELED_IMS_PER_BATCH or images) if stage == "student" else 0
    return int(images / num_processes * activation_bytes(cfg))


def memory_finding(
    cfg: CfgNode,
    model: nn.Module,
    sam: SamBackend | None,
    stages: Sequence[str],
    *,
    num_processes: int,
    num_local: int,
) -> Finding:
    """Compare the largest stage's memory with the device's, on a GPU with activations."""
    if not stages:
        return Finding("memory", "nothing to train")
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    needs = {s: stage_memory(cfg, s, model, sam, num_processes) for s in stages}
    extra = {s: step_bytes(stage_config(cfg, s), s, num_processes) for s in stages if on_gpu}
    stage = max(needs, key=lambda s: needs[s] + extra.get(s, 0))
    needed = needs[stage] * (1 if on_gpu else num_local)  # of one memory
    available, where = available_memory(cfg.MODEL.DEVICE), "of the GPU" if on_gpu else "available"
    text = f"{in_units(needed)} ({stage}: weights, gradients, optimizer"
    text += ", teacher" if stage == "student" else ""
    text += ", SAM" if sam is not None and needs_sam(cfg, stage) else ""
    text += f") + about {in_units(extra[stage])} of activations" if on_gpu else ") + activations"
    text += f", of {in_units(available)} {where}" if available else ""
    if not available or needed + extra.get(stage, 0) <= available:
        return Finding("memory", text)
    if needed <= available:
        warning = (
            f"The {stage} stage may need {in_units(needed + extra[stage])}, more than the "
            f"{in_units(available)} {where}: an estimate for a ResNet-50 with AMP. Use a smaller "
            "batch (SOLVER.IMS_PER_BATCH, S4M.UNLABELED_IMS_PER_BATCH) or crop, or more GPUs "
            "(docs/training.md has a table)."
        )
        return Finding("memory", text, (), [warning])
    warning = (
        f"The {stage} stage needs {in_units(needed)} before any image, more than the "
        f"{in_units(available)} {where}. Use a smaller model or SAM (S4M.SAM.MODEL_TYPE), or a "
        "device with more memory; a smaller batch does not help."
    )
    return Finding("memory", text, (), [warning])


def available_memory(device: str) -> int | None:
    """Bytes of a GPU, or those of RAM that programs may still take; None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(torch.device(device)).total_memory
    limits = []
    with suppress(OSError, LookupError, ValueError):  # not Linux
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a control group's limit; "max" is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)
