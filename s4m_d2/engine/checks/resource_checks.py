"""Weights fit their models, built without values; a run's files fit on the disk and in memory."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer, holds_run
from s4m_d2.engine.checkpointing.weight_names import ClassLists
from s4m_d2.engine.derived_settings import activation_bytes
from s4m_d2.engine.labeling.protocol import check_model
from s4m_d2.engine.own_data import class_lists
from s4m_d2.engine.stages import STAGES, final_weights, needs_sam, runs_stage, stage_config
from s4m_d2.errors import ConfigError, Finding, S4MError, attempt, raise_all
from s4m_d2.losses.structural_distillation import build_distillation
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.sam.backend import held_modules
from s4m_d2.semi import build_refiner

_Built = TypeVar("_Built")


def model_blueprint(cfg: CfgNode) -> nn.Module:
    """The model of a run with names and shapes, without values or SAM; S4MError of its builder."""
    build = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    model = _without_values(stage_config(cfg, "student"), build)
    if runs_stage(cfg, "student"):
        check_model(model)
    return model


def sam_blueprint(cfg: CfgNode) -> SamBackend:
    """The SAM of a run, its file checked, and the parts that consult it; S4MError of a builder."""

    def build(cfg: CfgNode) -> SamBackend:
        backend = build_sam_backend(cfg)
        if needs_sam(cfg, "teacher"):
            build_distillation(cfg, backend)
        if needs_sam(cfg, "student"):
            build_refiner(cfg, backend)
        return backend

    return _without_values(cfg, build)


def _without_values(cfg: CfgNode, build: Callable[[CfgNode], _Built]) -> _Built:
    """Build from a copy; with values where building computes with them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.DEVICE = "meta"  # PyTorch's device of tensors without values
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build(cfg)
        except S4MError:
            raise
        except Exception:  # of anyone's builder, which may copy values to NumPy or read files
            cfg.MODEL.DEVICE = "cpu"
            return build(cfg)


def in_units(size: float) -> str:
    """Format bytes in powers of 1024, such as 1.5 KiB."""
    power = min(max(int(size).bit_length() - 1, 0) // 10, 4)
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def bytes_of(module: nn.Module, *, trainable: bool = False) -> int:
    """Bytes of a module's parameters and buffers, or of the trainable parameters alone."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.nbytes for tensor in tensors if tensor.requires_grad or not trainable)


def sam_bytes(backend: SamBackend | None) -> int:
    """Bytes of the modules that a backend holds."""
    return 0 if backend is None else bytes_of(held_modules(backend))


def model_finding(cfg: CfgNode) -> tuple[nn.Module | None, Finding]:
    """The model without values, None if it cannot be built; the line of a report."""
    text = cfg.MODEL.META_ARCHITECTURE
    model, errors = attempt(model_blueprint, cfg)
    if model is not None:
        count = sum(parameter.numel() for parameter in model.parameters())
        text += f", {count / 1e6:.1f} million parameters"
    return model, Finding("model", text, errors)


def sam_finding(cfg: CfgNode) -> tuple[SamBackend | None, Finding]:
    """SAM without values, None if it is not needed or cannot be built; the line of a report."""
    if not any(needs_sam(cfg, stage) for stage in STAGES):
        return None, Finding("SAM", "not used")
    sam, errors = attempt(sam_blueprint, cfg)
    remedy = "; S4M.DISTILL.ENABLED False S4M.REFINE.ENABLED False trains without SAM"
    text = f"{cfg.S4M.SAM.BACKEND}, {cfg.S4M.SAM.CHECKPOINT or 'its own weights'}"
    return sam, Finding("SAM", text + (f" ({in_units(sam_bytes(sam))})" if sam else remedy), errors)


def weight_findings(
    cfg: CfgNode, model: nn.Module, stages: Sequence[str], *, resume: bool
) -> Iterator[Finding]:
    """Lines on MODEL.WEIGHTS, and on the models of earlier stages that later ones start with.

    With ``resume``, a stage with a checkpoint continues from it and needs no other weights.
    """
    begun = {stage: holds_run(stage_config(cfg, stage).OUTPUT_DIR) for stage in stages}
    path, timm = cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM
    if resume and all(begun[stage] for stage in stages if stage != "finetune"):
        yield Finding("first weights", "not needed: every stage continues from its checkpoint")
    elif path:
        yield _file_finding("first weights", model, path, class_lists(cfg, path))
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
            made = given or final_weights(cfg, earlier)
            yield _file_finding(earlier, model, made, class_lists(cfg, given))


def _file_finding(item: str, model: nn.Module, path: str, classes: ClassLists) -> Finding:
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
    """Make OUTPUT_DIR; ConfigError if it cannot be written, or holds a run that is not resumed."""
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
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        yield ConfigError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be made: '{parent}' is "
            f"{'not writable' if os.path.isdir(parent) else 'a file'}. Choose another folder."
        )
    for stage in STAGES:
        folder = stage_config(cfg, stage).OUTPUT_DIR
        if os.path.lexists(folder) and not os.path.isdir(folder):
            yield ConfigError(
                f"OUTPUT_DIR: '{folder}' is no folder. Move it, or choose another OUTPUT_DIR."
            )
        if holds_run(folder) and runs_stage(cfg, stage) and not resume:
            yield ConfigError(
                f"OUTPUT_DIR: '{folder}' holds a run already. Continue it with --resume, or "
                "choose another OUTPUT_DIR."
            )


def existing_parent(path: str) -> str:
    """The path itself, or the nearest folder above it that exists."""
    path = os.path.abspath(path)
    return path if os.path.lexists(path) else existing_parent(os.path.dirname(path))


def checkpoint_bytes(cfg: CfgNode, stage: str, model: nn.Module) -> int:
    """About how many bytes a stage saves: models (two in stage 2) and the optimizer's state."""
    models = 2 if stage == "student" else 1
    copies = 2 if cfg.SOLVER.OPTIMIZER == "ADAMW" else 1  # of a trained parameter, in the state
    return models * bytes_of(model) + copies * bytes_of(model, trainable=True)


def kept_checkpoints(cfg: CfgNode) -> int:
    """How many files a stage, of which this is the config, has at most: periodic and the last."""
    periodic = cfg.SOLVER.MAX_ITER // cfg.SOLVER.CHECKPOINT_PERIOD
    kept = cfg.SOLVER.CHECKPOINT_KEEP or periodic  # 0: all; a new one is written before one goes
    return min(periodic, kept) + 1


def disk_finding(cfg: CfgNode, model: nn.Module, stages: Sequence[str]) -> Finding:
    """Whether the checkpoints of the stages to run fit into what is free."""
    configs = {stage: stage_config(cfg, stage) for stage in stages}
    sizes = {stage: checkpoint_bytes(cfg, stage, model) for stage in stages}
    counts = {stage: kept_checkpoints(config) for stage, config in configs.items()}
    there = [p.stat().st_size for c in configs.values() for p in Path(c.OUTPUT_DIR).glob("*.pth")]
    needed = sum(counts[stage] * sizes[stage] for stage in stages) - sum(there)
    free = shutil.disk_usage(existing_parent(cfg.OUTPUT_DIR)).free
    parts = [f"{counts[stage]} x {in_units(sizes[stage])} ({stage})" for stage in stages]
    text = f"checkpoints {' + '.join(parts) or 'none'}; {in_units(free)} free"
    problem = (
        f"OUTPUT_DIR '{cfg.OUTPUT_DIR}': the checkpoints still to come have about "
        f"{in_units(needed)}, and {in_units(free)} are free. Free space, use another disk, raise "
        "SOLVER.CHECKPOINT_PERIOD or set SOLVER.CHECKPOINT_KEEP."
    )
    if max(sizes.values(), default=0) > free:
        return Finding("disk", text, [ConfigError(f"{problem} Not even one of them fits.")])
    return Finding("disk", text, (), [problem] * (needed > free))


def stage_memory(
    cfg: CfgNode, stage: str, model: nn.Module, sam: SamBackend | None, num_processes: int = 1
) -> int:
    """Estimate the bytes that one process of a stage holds, without images and PyTorch's own.

    What a checkpoint has, gradients (twice with several processes: DDP's buckets), SAM where the
    stage consults it and, on a GPU, activations.
    """
    size = checkpoint_bytes(cfg, stage, model)
    size += bytes_of(model, trainable=True) * (2 if num_processes > 1 else 1)
    size += sam_bytes(sam) if needs_sam(cfg, stage) else 0
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return size
    images = stage_config(cfg, stage).SOLVER.IMS_PER_BATCH
    images += (cfg.S4M.UNLABELED_IMS_PER_BATCH or images) if stage == "student" else 0
    return size + int(images / num_processes * activation_bytes(cfg))


def memory_finding(cfg: CfgNode, needs: Mapping[str, int], num_local: int) -> Finding:
    """Compare the largest stage's memory, of ``needs`` in bytes a process, with the device's."""
    if not needs:
        return Finding("memory", "nothing to train")
    stage = max(needs, key=needs.__getitem__)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    needed = needs[stage] * (1 if on_gpu else num_local)  # processes share the RAM
    available = available_memory(cfg.MODEL.DEVICE)
    text = f"about {in_units(needed)} ({stage}{'' if on_gpu else ', without activations'})"
    if not available:
        return Finding("memory", text)
    text += f", of {in_units(available)} {'of the GPU' if on_gpu else 'available'}"
    warning = (
        f"Training may need {text}. Use a smaller batch (SOLVER.IMS_PER_BATCH, "
        "S4M.UNLABELED_IMS_PER_BATCH), crop, model or SAM, or more GPUs (docs/training.md)."
    )
    return Finding("memory", text, (), [warning] * (needed > available))


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
