"""Before the first iteration: everything that can be known to go wrong, in one report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode

from s4m_d2.engine.checks.config_checks import check_config, config_errors
from s4m_d2.engine.checks.dataset_checks import check_datasets, dataset_findings
from s4m_d2.engine.checks.findings import Finding, PreflightReport
from s4m_d2.engine.checks.resource_checks import (
    check_output_dir,
    disk_finding,
    memory_finding,
    output_dir_errors,
)
from s4m_d2.engine.checks.resume_checks import resume_finding
from s4m_d2.engine.checks.weight_checks import model_finding, sam_finding, weight_findings
from s4m_d2.engine.labeling.gate import gate_findings
from s4m_d2.engine.labeling.quality import quality_findings
from s4m_d2.engine.stages import stage_config, stages_to_run
from s4m_d2.errors import ConfigError

__all__ = ["check_config", "check_datasets", "check_output_dir", "preflight"]


def preflight(
    cfg: CfgNode, *, resume: bool = False, num_processes: int = 1, num_local: int | None = None
) -> PreflightReport:
    """Check a training run without starting it; nothing is written.

    Data sets are loaded and a few of their images decoded; files of weights are compared with the
    models by their names and shapes; the sizes of checkpoints and models are estimated. Weights
    that Detectron2's path manager has to fetch are fetched into its cache, as training would.

    Args:
        cfg: of a whole run (:func:`~s4m_d2.engine.stages.run_config`).
        resume: the run continues what OUTPUT_DIR holds.
        num_processes: that share a batch, on all machines.
        num_local: those on this machine; default: all.

    Returns:
        the report, with all problems that were found.
    """
    num_local = num_processes if num_local is None else num_local
    errors = config_errors(cfg, num_processes=num_processes)
    stages = stages_to_run(cfg, resume=resume)
    settings = Finding("settings", _schedule(cfg, stages), errors)
    findings = [settings, *([resume_finding(cfg, stages, num_processes)] if resume else [])]
    findings.append(_device_finding(cfg, num_processes, num_local))
    if cfg.INPUT.FORMAT in ("RGB", "BGR") and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES > 0:
        findings += dataset_findings(cfg, not errors)
        findings += [*quality_findings(cfg), *gate_findings(cfg)]
    if errors:  # a model of wrong settings cannot be built, or is another than will be meant
        model, line = (
            None,
            Finding("model", "not built before the settings are right", checked=False),
        )
    else:
        model, line = model_finding(cfg)
    sam, of_sam = sam_finding(cfg, settings_are_right=not errors)
    findings += [line, of_sam, *weight_findings(cfg, model, stages, resume=resume)]
    where = " and ".join(f"{stage}/" for stage in stages) or "nothing, every stage is finished"
    refused = list(output_dir_errors(cfg, resume=resume))
    findings.append(Finding("output", f"{cfg.OUTPUT_DIR}: {where}", refused))
    if model is None:
        text = "estimated when the model can be built"
        findings += [Finding(item, text, checked=False) for item in ("disk", "memory")]
    else:
        processes = {"num_processes": num_processes, "num_local": num_local}
        findings.append(disk_finding(cfg, model, stages))
        findings.append(memory_finding(cfg, model, sam, stages, **processes))
    return PreflightReport(findings)


def _schedule(cfg: CfgNode, stages: Sequence[str]) -> str:
    """What will be trained, with which batches."""
    parts = []
    for stage in stages:
        solver = stage_config(cfg, stage).SOLVER
        batch = f"{solver.IMS_PER_BATCH} labeled"
        if stage == "student":
            batch += f" + {cfg.S4M.UNLABELED_IMS_PER_BATCH or solver.IMS_PER_BATCH} unlabeled"
        parts.append(f"{stage} {solver.MAX_ITER:,} iterations of {batch}")
    return "; ".join(parts) or "every stage is finished"


def _device_finding(cfg: CfgNode, num_processes: int, num_local: int) -> Finding:
    shared = f", {num_processes} processes" if num_processes > 1 else ""
    device = cfg.MODEL.DEVICE
    if not device.startswith("cuda") or not torch.cuda.is_available():  # the settings' business
        return Finding("device", device + shared)
    count = torch.cuda.device_count()
    text = f"{device}{shared}, {count} x {torch.cuda.get_device_name(0)}"
    if num_local <= count:
        return Finding("device", text)
    error = ConfigError(f"--num-gpus is {num_local}; expected at most {count}, the GPUs here.")
    return Finding("device", text, [error])
