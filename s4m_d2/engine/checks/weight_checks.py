"""Files of weights are compared with the models that will load them, values left unread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checkpointing.checkpoint_files import holds_run
from s4m_d2.engine.checks.config_checks import needs_sam, sam_errors
from s4m_d2.engine.checks.findings import Finding, in_units
from s4m_d2.engine.stages import STAGES, final_weights, stage_config
from s4m_d2.errors import S4MError
from s4m_d2.losses.structural_distillation import build_distillation
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.semi import build_refiner

_Built = TypeVar("_Built")


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


def model_finding(cfg: CfgNode) -> tuple[nn.Module | None, Finding]:
    """The model without values, None where it cannot be built; the line of a report."""
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
    """Lines on MODEL.WEIGHTS and on the teacher of stage 2.

    Args:
        cfg: of a whole run.
        model: of :func:`model_blueprint`; without one, only the files' existence is checked.
        stages: that will be trained.
        resume: a stage with a checkpoint continues from it and needs no other weights.
    """
    folders = [stage_config(cfg, stage).OUTPUT_DIR for stage in stages]
    path, timm = cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM
    if resume and all(holds_run(folder) for folder in folders):
        yield Finding("first weights", "not needed: every stage continues from its checkpoint")
    elif path:
        yield _file_finding("first weights", model, path)
    elif timm.PRETRAINED and cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        yield Finding("first weights", f"timm's of {timm.NAME}, read when training starts")
    else:
        yield Finding("first weights", "MODEL.WEIGHTS is empty: training starts from scratch")
    if "student" not in stages:
        return
    teacher = cfg.S4M.TEACHER_WEIGHTS
    if not teacher and "teacher" in stages:
        yield Finding("teacher", "made by stage 1 of this run")
    else:
        yield _file_finding("teacher", model, teacher or final_weights(cfg, "teacher"))


def _file_finding(item: str, model: nn.Module | None, path: str) -> Finding:
    if model is None and ("://" in path or os.path.isfile(path)):
        return Finding(item, f"{path}: compared when the model can be built", checked=False)
    model = nn.Module() if model is None else model  # without one, there is no file either
    branch = "teacher" if item == "teacher" else "student"
    try:
        report = S4MCheckpointer(model).inspect(path, branch=branch, require=item == "teacher")
    except S4MError as error:
        return Finding(item, path, [error])
    text = f"{path}: {len(report.matched)} of the model's {len(model.state_dict())} tensors"
    warning = f"{report}. If this is not meant, use the config that the file was trained with."
    return Finding(item, text, (), [warning] if report.is_surprising else [])
