"""What the command line runs: the stages that a config asks for, or an evaluation."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checks.findings import Finding, PreflightReport
from s4m_d2.engine.checks.preflight import check_output_dir, preflight
from s4m_d2.engine.command.arguments import num_processes, read_config
from s4m_d2.engine.command.run_facts import write_facts
from s4m_d2.engine.command.run_lock import lock_run
from s4m_d2.engine.command.run_report import draw_final, reported
from s4m_d2.engine.stages import final_weights, stage_config, stages_to_run
from s4m_d2.engine.training.trainer import S4MTrainer, TeacherTrainer
from s4m_d2.errors import WeightsError

logger = logging.getLogger(__name__)


def check(args: argparse.Namespace) -> PreflightReport:
    """The report on a training run, before any process is started.

    But for ``--check``, the first process reserves OUTPUT_DIR, which is made if nothing is wrong.

    Raises:
        ConfigError: another run uses OUTPUT_DIR.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.num_gpus))  # torchrun's
    started = num_processes(args)
    cfg, own_data = read_config(args)
    starts = not args.check and int(os.environ.get("RANK", args.machine_rank)) == 0
    if starts:
        lock_run(cfg.OUTPUT_DIR)  # before the checks: what is wrong with it may be the other's
    report = preflight(cfg, resume=args.resume, num_processes=started, num_local=local)
    if own_data is not None:
        report = PreflightReport((*own_data.findings(), *report.findings))
    if starts and not report.errors:
        check_output_dir(cfg, resume=args.resume)
        lock_run(cfg.OUTPUT_DIR)
    return report


def train(
    cfg: CfgNode, *, resume: bool, checked: Iterable[Finding] = ()
) -> Mapping[str, Any] | None:
    """Run the stages that S4M.STAGE asks for; a finished stage is not run again on resume.

    However it ends, OUTPUT_DIR/report.html is written.

    Args:
        checked: what the checks before training found, for the report.

    Returns:
        what the last stage's trainer returns.
    """
    if comm.is_main_process():
        logger.info("s4m_d2 of this run: %s", write_facts(cfg.OUTPUT_DIR, checked)["s4m_d2"])
    with reported(cfg.OUTPUT_DIR):
        return _train_stages(cfg, resume)


def _train_stages(cfg: CfgNode, resume: bool) -> Mapping[str, Any] | None:
    results = None
    for stage in stages_to_run(cfg, resume=resume):
        of_stage = stage_config(cfg, stage)
        if stage == "teacher":
            trainer = TeacherTrainer(of_stage)
        else:
            weights = cfg.S4M.TEACHER_WEIGHTS or final_weights(cfg, "teacher")
            trainer = S4MTrainer(of_stage, weights)
        os.makedirs(of_stage.OUTPUT_DIR, exist_ok=True)
        trainer.resume_or_load(resume=resume)
        results = trainer.train()
        draw_final(of_stage, trainer.trained_model, getattr(trainer, "pseudo_labeling", None))
        comm.synchronize()  # the first process has written what the others may read next
        del trainer  # the next stage needs the memory
    return results


def evaluate(cfg: CfgNode) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS: the student, the teacher or both, as S4M.EVAL says.

    Raises:
        WeightsError: MODEL.WEIGHTS is empty or does not hold what is evaluated.
    """
    if not cfg.MODEL.WEIGHTS:
        raise WeightsError("--eval-only needs MODEL.WEIGHTS: the checkpoint to evaluate.")
    cfg = stage_config(cfg, "student")
    model = TeacherTrainer.build_model(cfg)
    branches = ("student", "teacher") if cfg.S4M.EVAL == "both" else (cfg.S4M.EVAL,)
    results: dict[str, Any] = {}
    for branch in branches:
        S4MCheckpointer(model).load(cfg.MODEL.WEIGHTS, branch=branch, require=True)
        logger.info("Evaluating the %s of %s", branch, cfg.MODEL.WEIGHTS)
        results[branch] = TeacherTrainer.test(cfg, model)
    if len(branches) == 1:
        results = results[branches[0]]
    if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
        verify_results(cfg, results)
    return results
