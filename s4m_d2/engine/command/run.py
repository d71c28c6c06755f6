"""Training of the stages of a config, with run.json and report.html, and evaluation."""

import argparse
import logging
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import detectron2
import numpy
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checks.preflight import PreflightReport, preflight
from s4m_d2.engine.checks.resource_checks import check_output_dir
from s4m_d2.engine.command.arguments import num_processes, read_config
from s4m_d2.engine.command.launch import as_text
from s4m_d2.engine.figures.figure_set import FOLDER, FigureSet
from s4m_d2.engine.labeling.gate import decide_by_sam
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.labeling.sam_adaptation import adapted_config
from s4m_d2.engine.stages import STAGES, final_weights, stage_config, stages_to_run
from s4m_d2.engine.training.trainer import FineTuneTrainer, S4MTrainer, TeacherTrainer
from s4m_d2.errors import ConfigError, DatasetError, Finding
from s4m_d2.files import remove_temporaries
from s4m_d2.report import write_report, write_results
from s4m_d2.report.run import FACTS
from s4m_d2.visualization import write_png

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = ".lock"


def check(args: argparse.Namespace) -> PreflightReport:
    """Check a training run before any process is started.

    Without ``--check``, the first process locks OUTPUT_DIR, and creates it if there is no error.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", args.num_gpus))  # torchrun's
    counts = {"num_processes": num_processes(args), "num_local": local}
    starts = not args.check and int(os.environ.get("RANK", args.machine_rank)) == 0
    with tempfile.TemporaryDirectory(prefix="s4m_check.") as folder:
        cfg, own_data = read_config(args, frames_dir=folder if args.check else "")
        if starts:
            lock_run(cfg.OUTPUT_DIR)  # before the checks, which another run in it would disturb
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
    """Run the stages of S4M.STAGE, with ``resume`` only unfinished ones; the last one's results."""
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

    Predictions come into OUTPUT_DIR/inference.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.S4M.DISTILL.ENABLED = False  # consults SAM
    cfg.freeze()
    model = TeacherTrainer.build_model(cfg)
    both = cfg.S4M.EVAL == "both"
    results: dict[str, Any] = {}
    for branch in ("teacher", "student") if both else (cfg.S4M.EVAL,):  # the last one's files stay
        S4MCheckpointer(model).load(cfg.MODEL.WEIGHTS, branch=branch, require=True)
        logger.info("Evaluating the %s of %s", branch, cfg.MODEL.WEIGHTS)
        try:
            found = TeacherTrainer.test(cfg, model)
        except FileNotFoundError as error:
            remedy = "Set DETECTRON2_DATASETS to the folder that holds the data sets."
            raise DatasetError(f"{error.filename} does not exist. {remedy}") from error
        results |= {branch: found} if both else found
    if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
        verify_results(cfg, results)
    return results


def lock_run(folder: str) -> None:
    """Lock an existing folder for this process, not for forks, until it ends.

    Without effect if the file system does not support locks. ConfigError: another process has it.
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
            f"OUTPUT_DIR '{folder}' is in use by another run ({owner}). Wait for its end or stop "
            "it, or choose another OUTPUT_DIR."
        ) from None
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode(), 0)
    # Not closed: closing any handle of the file would release the lock.


def write_facts(folder: str, findings: Iterable[Finding] = ()) -> dict[str, str]:
    """Write the findings of the checks before training, and versions, by name."""
    texts: dict[str, list[str]] = {}
    for f in findings:  # some have the same name
        texts.setdefault(f.item, []).append(f.text + f" ({f.status})" * (f.status != "ok"))
    facts = {item: "; ".join(of_item) for item, of_item in texts.items()}
    facts |= {"platform": platform.platform(), "Python": platform.python_version()}
    parts = (sys.modules["s4m_d2"], detectron2, torch, torchvision, numpy)
    facts |= {part.__name__: part.__version__ for part in parts}
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    write_results(facts, os.path.join(folder, FACTS))
    return facts


@contextmanager
def reported(folder: str) -> Iterator[None]:
    """Write the report after a training, also if it fails; remove killed runs' temporary files."""
    if comm.is_main_process():
        remove_temporaries(folder)
        for stage in STAGES:
            for below, _, _ in os.walk(os.path.join(folder, stage)):
                remove_temporaries(below)
    problem = ""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        problem = "Stopped; --resume continues it." if stopped else as_text(error)
        raise
    finally:
        if comm.is_main_process():
            try:
                logger.info("Report: %s", write_report(folder, problem))
            except (Exception, KeyboardInterrupt) as error:  # must not hide the training's error
                text = as_text(error)
                logger.warning("The report of '%s' could not be written: %s", folder, text)


def draw_final(cfg: CfgNode, model: nn.Module, labeling: PseudoLabeling | None = None) -> None:
    """Draw validation images with a stage's final models, unless S4M.FIGURES has drawn them.

    One by one and resized as in evaluation, so that it needs no more memory. Errors are warnings.
    """
    if not comm.is_main_process() or not cfg.DATASETS.TEST:
        return
    try:
        figures = FigureSet.of_stage(cfg, 4, model, labeling, resized=True)
        for name in figures.choose(("predictions", "pseudo_labels")):
            path = os.path.join(cfg.OUTPUT_DIR, FOLDER, f"{name}_{cfg.SOLVER.MAX_ITER:07d}.png")
            if not os.path.exists(path):
                write_png(figures.draw(name), path)
    except Exception as error:  # must not end the run
        logger.warning("The report lacks pictures of the final models: %s", as_text(error))
