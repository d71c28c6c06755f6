"""What --resume continues, and what is another than when the run was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT, saved_state
from s4m_d2.engine.checks.findings import Finding
from s4m_d2.engine.stages import STAGES, runs_stage, stage_config, student_has_begun
from s4m_d2.engine.training.continuing import MAX_ITER, changes, continuation_errors, run_settings
from s4m_d2.errors import ConfigError, S4MError

_REFUSED = "the run cannot continue with these settings"
_NOTHING = "there is nothing to continue: training begins"
_FINISHED = "every stage is finished; a larger SOLVER.MAX_ITER would train on"


def resume_finding(cfg: CfgNode, stages: Sequence[str], num_processes: int) -> Finding:
    """The line of a report, with each changed setting as a warning or an error.

    Args:
        cfg: of a whole run.
        stages: that are left to train.
        num_processes: that share a batch, on all machines.
    """
    texts: list[str] = []
    errors: list[S4MError] = []
    warnings: list[str] = []
    for stage in filter(lambda stage: runs_stage(cfg, stage), STAGES):
        of_stage = stage_config(cfg, stage)
        name, content = saved_state(of_stage.OUTPUT_DIR)
        if not isinstance(content.get("iteration"), int):
            continue
        finished, before = content["iteration"] + 1, _settings(content)
        if stage == "teacher" and student_has_begun(cfg):
            errors += _teacher_errors(cfg, before)
            continue
        now = run_settings(of_stage, num_processes, has_teacher=stage == "student")
        refused = list(continuation_errors(finished, before, now))
        errors += refused
        if stage in stages and not refused:
            state = "had ended" if name == FINAL_CHECKPOINT else "was stopped"
            length = f"goes on to {now[MAX_ITER]:,}"
            texts.append(f"{stage} {state} after {finished:,} iterations, {length}")
            warnings += changes(before, now)
    text = "; ".join(texts) or (_REFUSED if errors else _NOTHING if stages else _FINISHED)
    return Finding("resume", text, tuple(errors), tuple(warnings))


def _settings(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a checkpoint was made with, none if it does not say."""
    try:
        return dict(content["trainer"]["hooks"]["RunStateHook"]["settings"])
    except (LookupError, TypeError, ValueError):
        return {}


def _teacher_errors(cfg: CfgNode, before: Mapping[str, Any]) -> Iterator[ConfigError]:
    """The teacher that stage 2 has begun with is to be another one."""
    asked = cfg.S4M.TEACHER.MAX_ITER
    trained = before.get(MAX_ITER, asked)
    if asked not in (0, trained):
        yield ConfigError(
            f"S4M.TEACHER.MAX_ITER is {asked}, but stage 2 in '{cfg.OUTPUT_DIR}' has begun with a "
            f"teacher of {trained} iterations, which stays what it is. Leave it at {trained} "
            "(SOLVER.MAX_ITER trains stage 2 longer), or start a new run in another OUTPUT_DIR."
        )
