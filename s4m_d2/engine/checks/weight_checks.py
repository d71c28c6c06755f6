"""Files of weights are compared with the models that will load them, values left unread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


def sam_bytes(backend: SamBackend) -> int:
    """Bytes of the modules that a backend holds."""
    parts = [part for part in vars(backend).values() if isinstance(part, nn.Module)]
    return bytes_of(nn.ModuleList(parts))


@dataclass(frozen=True)
class Blueprints:
    """What was built for the checks; None where it could not be, or is not needed."""

    model: nn.Module | None
    sam: SamBackend | None


def blueprint_findings(
    cfg: CfgNode, *, settings_are_right: bool = True
) -> tuple[Blueprints, list[Finding]]:
    """Build the model and SAM without values; the lines of a report on them and on SAM's file.

    Args:
        cfg: of a whole run.
        settings_are_right: without that nothing is built, and only SAM's file is looked for.
    """
    model, sam = None, None
    line = Finding("model", "not built before the settings are right", checked=False)
    if settings_are_right:
        try:
            model = model_blueprint(cfg)
            count = sum(parameter.numel() for parameter in model.parameters())
            text = f"{cfg.MODEL.META_ARCHITECTURE}, {count / 1e6:.1f} million parameters"
            line = Finding("model", text)
        except S4MError as error:
            line = Finding("model", "cannot be built", (error,))
    if not any(needs_sam(cfg, stage) for stage in STAGES):
        return Blueprints(model, None), [line, Finding("SAM", "not used")]
    errors = list(sam_errors(cfg))
    if settings_are_right and not errors:
        try:
            sam = sam_blueprint(cfg)
        except S4MError as error:
            errors.append(error)
    size = f" ({in_units(sam_bytes(sam))})" if sam is not None else ""
    text = f"{cfg.S4M.SAM.BACKEND}, {cfg.S4M.SAM.CHECKPOINT or 'the packaged weights'}{size}"
    sam_line = Finding("SAM", text, tuple(errors), checked=settings_are_right)
    return Blueprints(model, sam), [line, sam_line]


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
    if teacher or "teacher" not in stages:
        teacher = teacher or final_weights(cfg, "teacher")
        yield _file_finding("teacher", model, teacher, branch="teacher", whole=True)
    else:
        yield Finding("teacher", "made by stage 1 of this run")


def _file_finding(
    item: str, model: nn.Module | None, path: str, *, branch: str = "student", whole: bool = False
) -> Finding:
    if model is None and ("://" in path or os.path.isfile(path)):
        return Finding(item, f"{path}: compared when the model can be built", checked=False)
    model = nn.Module() if model is None else model  # without one, there is no file either
    try:
        report = S4MCheckpointer(model).inspect(path, branch=branch, require=whole)
    except S4MError as error:
        return Finding(item, path, (error,))
    text = f"{path}: {len(report.matched)} of the model's {len(model.state_dict())} tensors"
    warning = f"{report}. If this is not meant, use the config that the file was trained with."
    return Finding(item, text, (), (warning,) if report.is_surprising else ())
