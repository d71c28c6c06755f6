"""The check before training: all predictable problems in one report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from s4m_d2.engine.checkpointing.checkpoint import FINAL_CHECKPOINT, saved_state
from s4m_d2.engine.checks.config_checks import config_errors
from s4m_d2.engine.checks.dataset_checks import dataset_findings
from s4m_d2.engine.checks.findings import Finding, PreflightReport, attempt
from s4m_d2.engine.checks.resource_checks import (
    disk_finding,
    memory_finding,
    model_finding,
    output_dir_errors,
    sam_finding,
    stage_memory,
    weight_findings,
)
from s4m_d2.engine.config_file import config_items, load_config
from s4m_d2.engine.labeling.gate import WEIGHTS, sam_findings
from s4m_d2.engine.labeling.quality import quality_findings
from s4m_d2.engine.stages import STAGES, is_fixed, runs_stage, stage_config, stages_to_run
from s4m_d2.engine.training.hooks import MAX_ITER, changes, continuation_errors, run_settings
from s4m_d2.errors import ConfigError, S4MError, first_names
from s4m_d2.report.run import CONFIG

_NOT_TRAINED_WITH = (  # beginnings of keys that a continued run may change
    "DATALOADER.NUM_WORKERS", "DATASETS.", "MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR",
    "S4M.DATA.", "S4M.EVAL", "S4M.FIGURES.", "S4M.FINETUNE.", "S4M.QUALITY.", "S4M.STAGE",
    "S4M.TEACHER", "SOLVER.CHECKPOINT", "TEST.",
)  # fmt: skip
_SHOWN = 8  # changed settings in a message


def preflight(
    cfg: CfgNode,
    *,
    resume: bool = False,
    num_processes: int = 1,
    num_local: int | None = None,
    with_sam: bool = False,
) -> PreflightReport:
    """Check a training run without starting it; nothing is written.

    Data sets are loaded and a few of their images decoded; weight files (remote ones are
    downloaded) are compared with the models by names and shapes; sizes of checkpoints and models
    are estimated. What needs a part that is wrong (settings, data, the model) is left out.

    Args:
        num_processes: that share a batch, on all machines; of these ``num_local`` (default: all)
            are on this one.
        with_sam: also measure SAM on labeled images, where that takes seconds.
    """
    num_local = num_processes if num_local is None else num_local
    errors = config_errors(cfg, num_processes=num_processes)
    stages = stages_to_run(cfg, resume=resume)
    findings = [Finding("settings", _schedule(cfg, stages), errors)]
    findings += [resume_finding(cfg, stages, num_processes)] if resume else []
    findings.append(_device_finding(cfg, num_processes, num_local))
    where = " and ".join(f"{stage}/" for stage in stages) or "nothing, every stage is finished"
    refused = list(output_dir_errors(cfg, resume=resume))
    findings.append(Finding("output", f"{cfg.OUTPUT_DIR}: {where}", refused))
    if errors:
        return PreflightReport(findings)
    of_data = list(dataset_findings(cfg))
    findings += of_data
    data_are_right = not any(finding.errors for finding in of_data)
    if data_are_right:
        findings += quality_findings(cfg)
    model, of_model = model_finding(cfg)
    sam, of_sam = sam_finding(cfg)
    findings += [of_model, of_sam]
    findings += sam_findings(cfg, sam) if with_sam and data_are_right else []
    if model is not None:
        findings += weight_findings(cfg, model, stages, resume=resume)
        needs = {stage: stage_memory(cfg, stage, model, sam, num_processes) for stage in stages}
        findings.append(disk_finding(cfg, model, stages))
        findings.append(memory_finding(cfg, needs, num_local))
    return PreflightReport(findings)


def resume_finding(cfg: CfgNode, stages: Sequence[str], num_processes: int) -> Finding:
    """Where a run goes on with the stages that remain, and each setting that has changed."""
    texts: list[str] = []
    errors: list[S4MError] = []
    warnings: list[str] = []
    for stage in filter(lambda stage: runs_stage(cfg, stage), STAGES):
        of_stage = stage_config(cfg, stage)
        name, content = saved_state(of_stage.OUTPUT_DIR)
        if not isinstance(content.get("iteration"), int):
            continue
        try:
            before = dict(content["trainer"]["hooks"]["RunStateHook"]["settings"])
        except (LookupError, TypeError, ValueError):  # of another program or version
            before = {}
        if is_fixed(cfg, stage):
            errors += _fixed_length_errors(cfg, stage, before)
            continue
        finished = content["iteration"] + 1
        now = run_settings(of_stage, num_processes, has_teacher=stage == "student")
        refused = list(continuation_errors(finished, before, now))
        errors += refused
        if stage in stages and not refused:
            state = f"{stage} {'had ended' if name == FINAL_CHECKPOINT else 'was stopped'}"
            texts.append(f"{state} after {finished:,} iterations, goes on to {now[MAX_ITER]:,}")
            warnings += changes(before, now)
    if texts and (differing := _differing(cfg)):
        warnings.append(
            f"Not as when the run was last started: {first_names(differing, _SHOWN)}. Overrides "
            "have to be repeated."
        )
    nothing = "there is nothing to resume: training begins"
    if errors:
        nothing = "the run cannot continue with these settings"
    elif not stages:
        nothing = "every stage is finished; a larger SOLVER.MAX_ITER would train on"
    return Finding("resume", "; ".join(texts) or nothing, errors, warnings)


def _differing(cfg: CfgNode) -> list[str]:
    """Other settings of training than those in OUTPUT_DIR/config.yaml, with both values."""
    path = os.path.join(cfg.OUTPUT_DIR, CONFIG)
    before = attempt(load_config, path)[0] if os.path.isfile(path) else None
    if before is None:
        return []
    old, reported = _leaves(before), run_settings(cfg, 1, has_teacher=True)
    if os.path.basename(str(old["S4M.SAM.CHECKPOINT"])).startswith(WEIGHTS):  # the run's own
        del old["S4M.SAM.CHECKPOINT"]
    return [
        f"{key} {value!r} (was {old[key]!r})"
        for key, value in _leaves(cfg).items()
        if old.get(key, value) != value
        and not key.startswith(_NOT_TRAINED_WITH)
        and key not in reported
    ]


def _leaves(cfg: CfgNode) -> dict[str, Any]:
    items = ((key, v) for key, v in config_items(cfg) if not isinstance(v, CfgNode))
    return {key: list(v) if isinstance(v, tuple) else v for key, v in items}


def _fixed_length_errors(cfg: CfgNode, stage: str, before: Mapping[str, Any]) -> Iterator[S4MError]:
    """Refuse another length of a stage after the next one has begun."""
    of_teacher = cfg.S4M.TEACHER.MAX_ITER, "S4M.TEACHER.MAX_ITER"
    asked, key = of_teacher if stage == "teacher" else (cfg.SOLVER.MAX_ITER, MAX_ITER)
    trained = before.get(MAX_ITER, asked)
    if asked not in (0, trained):
        yield ConfigError(
            f"{key} is {asked}, but the next stage has begun with a {stage} of {trained} "
            f"iterations, which stays what it is. Leave it at {trained}, or start a new run."
        )


def _schedule(cfg: CfgNode, stages: Sequence[str]) -> str:
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
    if not device.startswith("cuda") or not torch.cuda.is_available():  # see config_checks
        return Finding("device", device + shared)
    count = torch.cuda.device_count()
    text = f"{device}{shared}, {count} x {torch.cuda.get_device_name(0)}"
    error = ConfigError(f"--num-gpus is {num_local}; expected at most {count}, the GPUs here.")
    return Finding("device", text, [error] * (num_local > count))
