"""Training of the stages of a config, and evaluation, for the command line."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checks.findings import Finding, PreflightReport
from s4m_d2.engine.checks.preflight import check_output_dir, preflight
from s4m_d2.engine.command.arguments import num_processes, read_config
from s4m_d2.engine.command.run_report import draw_final, reported, write_facts
from s4m_d2.engine.labeling.sam_adaptation import adapted_config
from s4m_d2.engine.labeling.sam_quality import decide_by_sam
from s4m_d2.engine.stages import final_weights, stage_config, stages_to_run
from s4m_d2.engine.training.trainer import FineTuneTrainer, S4MTrainer, TeacherTrainer
from s4m_d2.errors import ConfigError, WeightsError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lock"


def check(args: argparse.Namespace) -> PreflightReport:
    """Check a training run before any process is started.

    Without ``--check``, the first process locks OUTPUT_DIR, and creates it if there is no error.

    Raises:
        ConfigError: another run uses OUTPUT_DIR.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.num_gpus))  # torchrun's
    started = num_processes(args)
    cfg, own_data = read_config(args)
    starts = not args.check and int(os.environ.get("RANK", args.machine_rank)) == 0
    if starts:
        lock_run(cfg.OUTPUT_DIR)  # before the checks, which another run in it would disturb
    counts = {"num_processes": started, "num_local": local}
    report = preflight(cfg, resume=args.resume, with_sam=args.check, **counts)
    if own_data is not None:
        report = PreflightReport((*own_data.findings(), *report.findings))
    if starts and not report.errors:
        check_output_dir(cfg, resume=args.resume)
        lock_run(cfg.OUTPUT_DIR)
    return report


def train(
    cfg: CfgNode, *, resume: bool, checked: Iterable[Finding] = ()
) -> Mapping[str, Any] | None:
    """Run the stages of S4M.STAGE, with ``resume`` only unfinished ones.

    OUTPUT_DIR/report.html is written at the end, also after an error.

    Args:
        checked: findings of the checks before training, for the report.

    Returns:
        results of the last stage's trainer.
    """
    if comm.is_main_process():
        logger.info("s4m_d2 of this run: %s", write_facts(cfg.OUTPUT_DIR, checked)["s4m_d2"])
    results = None
    with reported(cfg.OUTPUT_DIR):
        cfg = adapted_config(cfg, resume=resume)
        for stage in stages_to_run(cfg, resume=resume):
            of_stage = decide_by_sam(stage_config(cfg, stage), stage, resume=resume)
            if stage == "student":
                weights = cfg.S4M.TEACHER_WEIGHTS or final_weights(cfg, "teacher")
                trainer: TeacherTrainer = S4MTrainer(of_stage, weights)
            else:
                trainer = (TeacherTrainer if stage == "teacher" else FineTuneTrainer)(of_stage)
            os.makedirs(of_stage.OUTPUT_DIR, exist_ok=True)
            trainer.resume_or_load(resume=resume)
            results = trainer.train()
            draw_final(of_stage, trainer.trained_model, getattr(trainer, "pseudo_labeling", None))
            comm.synchronize()  # the first process has written files that the others may read next
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
    both = cfg.S4M.EVAL == "both"
    results: dict[str, Any] = {}
    for branch in ("student", "teacher") if both else (cfg.S4M.EVAL,):
        S4MCheckpointer(model).load(cfg.MODEL.WEIGHTS, branch=branch, require=True)
        logger.info("Evaluating the %s of %s", branch, cfg.MODEL.WEIGHTS)
        found = TeacherTrainer.test(cfg, model)
        results |= {branch: found} if both else found
    if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
        verify_results(cfg, results)
    return results


def lock_run(folder: str) -> None:
    """Lock an existing folder for this process until it ends.

    It is a record lock of the system, which forked processes do not keep; the file names the owner.
    Without effect if the file system does not support locks.

    Raises:
        ConfigError: another process has the lock.
    """
    if fcntl is None:
        return
    try:
        file = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # output_dir_errors reports it
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(file, 200).decode("utf-8", "replace")
        os.close(file)
        if not isinstance(error, BlockingIOError | PermissionError):  # NFS without its lock service
            return
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' is in use by another run: {owner or 'it does not say which'}. "
            "Wait for its end or stop it, or choose another OUTPUT_DIR."
        ) from None
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode(), 0)
    # Not closed: closing any handle of the file would release the lock.
