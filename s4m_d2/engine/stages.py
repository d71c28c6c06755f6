"""The two stages of a run: which are trained, with which config, and whether they are finished."""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import CfgNode

from s4m_d2.engine.checkpointing.checkpoint_files import (
    FINAL_CHECKPOINT,
    final_iterations,
    holds_run,
)
from s4m_d2.report import read_results

STAGES = ("teacher", "student")
METRICS, RESULTS = "metrics.json", "results.json"  # in a stage's folder; of the last evaluation
ITERATIONS = "iterations"  # of RESULTS: those that were done then


def run_config(cfg: CfgNode) -> CfgNode:
    """The config as this machine runs it: AMP on CUDA only, and always a seed.

    A negative SEED (Detectron2: a different one in each run) becomes 0, because a run that is to be
    continued exactly needs the same seed again.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        cfg.SOLVER.AMP.ENABLED = False
    cfg.SEED = max(cfg.SEED, 0)
    cfg.freeze()
    return cfg


def runs_stage(cfg: CfgNode, stage: str) -> bool:
    """Whether a run with this config trains the "teacher" (stage 1) or the "student" (stage 2)."""
    if stage == "teacher":
        return cfg.S4M.STAGE != "student" and not cfg.S4M.TEACHER_WEIGHTS
    return cfg.S4M.STAGE != "teacher"


def stages_to_run(cfg: CfgNode, *, resume: bool) -> list[str]:
    """The stages that a run trains; with ``resume``, without those that are finished.

    The teacher of a stage 2 that has begun stays what it is, however long stage 1 is to be now.
    """
    stages = [stage for stage in STAGES if runs_stage(cfg, stage)]
    if not resume:
        return stages
    lengths = {"teacher": 0} if student_has_begun(cfg) else {}
    return [s for s in stages if not stage_is_finished(stage_config(cfg, s), lengths.get(s))]


def student_has_begun(cfg: CfgNode) -> bool:
    """Whether OUTPUT_DIR holds a checkpoint of stage 2."""
    return holds_run(stage_config(cfg, "student").OUTPUT_DIR)


def stage_is_finished(cfg: CfgNode, iterations: int | None = None) -> bool:
    """Whether nothing is left to do for a stage: trained, and evaluated if DATASETS.TEST says so.

    No checkpoint is read.

    Args:
        cfg: config of the stage.
        iterations: that it is to have; default: SOLVER.MAX_ITER.
    """
    iterations = cfg.SOLVER.MAX_ITER if iterations is None else iterations
    done = final_iterations(cfg.OUTPUT_DIR)
    if not done or done < iterations:
        return False
    return not cfg.DATASETS.TEST or stored_results(cfg.OUTPUT_DIR).get(ITERATIONS) == done


def stored_results(folder: str) -> dict[str, Any]:
    """Results of the last evaluation of a stage in ``folder``; {}: none that can be read."""
    try:
        return dict(read_results(os.path.join(folder, RESULTS)))
    except (OSError, TypeError, ValueError):
        return {}


def final_weights(cfg: CfgNode, stage: str) -> str:
    """Where a stage writes its last checkpoint."""
    return os.path.join(stage_config(cfg, stage).OUTPUT_DIR, FINAL_CHECKPOINT)


def stage_config(cfg: CfgNode, stage: str) -> CfgNode:
    """One stage's config: its output folder, batch, schedule, sampler, and no distillation in 2."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR.rstrip('/')}/{stage}"
    if stage == "teacher":
        teacher = cfg.S4M.TEACHER
        cfg.SOLVER.IMS_PER_BATCH = teacher.IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH
        cfg.SOLVER.MAX_ITER = teacher.MAX_ITER or cfg.SOLVER.MAX_ITER
        cfg.SOLVER.STEPS = teacher.STEPS or cfg.SOLVER.STEPS
        cfg.DATALOADER.SAMPLER_TRAIN = teacher.SAMPLER
    else:
        cfg.S4M.DISTILL.ENABLED = False
    cfg.freeze()
    return cfg
