"""Writes OUTPUT_DIR/run.json (checks and versions) and report.html."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import detectron2
import numpy
import torch
import torchvision
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT
from s4m_d2.engine.checks.findings import Finding
from s4m_d2.engine.command.failures import as_text
from s4m_d2.engine.figures.figure_set import FOLDER, FigureSet
from s4m_d2.engine.labeling import gate, sam_adaptation, sam_quality
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.stages import ITERATIONS, METRICS, STAGES, stored_results
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write, remove_temporaries
from s4m_d2.report import (
    Run,
    Settings,
    Stage,
    pictures_of,
    read_curves,
    render_page,
    write_results,
)
from s4m_d2.visualization import write_png

logger = logging.getLogger(__name__)

FACTS, REPORT, CONFIG = "run.json", "report.html", "config.yaml"
OVERVIEW = "overview.png"  # of the quickstart
DRAWN_AT_END = ("predictions", "pseudo_labels")
IMAGES = 4  # of each
GIT_SECONDS = 5  # timeout of git


def write_facts(folder: str, findings: Iterable[Finding] = ()) -> dict[str, str]:
    """Write the findings of the checks before training, and versions, by name.

    Raises:
        OutputError: the file cannot be written.
    """
    facts: dict[str, str] = {}
    for f in findings:  # some have the same name
        text = f.text + f" ({f.status})" * (f.status != "ok")
        facts[f.item] = f"{facts[f.item]}; {text}" if f.item in facts else text
    facts |= {"s4m_d2": _code_version(), "platform": platform.platform()}
    facts |= {"Python": platform.python_version()}
    facts |= {part.__name__: part.__version__ for part in (detectron2, torch, torchvision, numpy)}
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    write_results(facts, os.path.join(folder, FACTS))
    return facts


def _code_version() -> str:
    """The package's version and, in a clone of the repository, its commit."""
    package = sys.modules["s4m_d2"]  # its parts must not import it
    version, root = package.__version__, Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return version
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        described = subprocess.check_output(
            [*command, "--abbrev=10"], stderr=subprocess.DEVNULL, text=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}, commit {described.strip()}"


def write_report(folder: str, problem: str = "") -> str:
    """Write the report of a run from the files in its output folder; returns the page's path.

    Args:
        problem: why the run ended early, if it did.

    Raises:
        DatasetError: the folder contains no run.
        OutputError: the page cannot be written.
    """
    page = render_page(read_run(folder, problem))
    path = os.path.join(folder, REPORT)
    with atomic_write(path, "wb") as file:
        file.write(page.encode("utf-8", "replace"))
    return path


@contextmanager
def reported(folder: str) -> Iterator[None]:
    """Write the report after a training in the block, also if it fails or is stopped.

    By the main process. If the report cannot be written, a warning is logged. Temporary files of
    killed runs are removed first.
    """
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

    In the main process, one by one and resized as in evaluation, so that it needs no more memory.
    Errors are logged as warnings.

    Args:
        cfg: config of the stage.
        model: the trained model, without wrappers.
        labeling: of stage 2.
    """
    if not comm.is_main_process() or not cfg.DATASETS.TEST:
        return
    try:
        figures = FigureSet.of_stage(cfg, IMAGES, model, labeling, resized=True)
        for name in figures.choose(DRAWN_AT_END):
            file = f"{name}_{cfg.SOLVER.MAX_ITER:07d}.png"
            path = os.path.join(cfg.OUTPUT_DIR, FOLDER, file)
            if not os.path.exists(path):
                write_png(figures.draw(name), path)
    except Exception as error:  # must not end the run
        logger.warning("The report lacks pictures of the final models: %s", as_text(error))


def read_run(folder: str, problem: str = "") -> Run:
    """Read a run from its output folder.

    Raises:
        DatasetError: the folder contains no run.
    """
    config = ""
    with suppress(OSError):
        config = Path(folder, CONFIG).read_text(encoding="utf-8", errors="replace")
    settings = Settings()
    with suppress(Exception):  # PyYAML raises many kinds
        settings = Settings(yaml.safe_load(config))
    present = [name for name in STAGES if os.path.isdir(os.path.join(folder, name))]
    if not config and not present:
        raise DatasetError(
            f"'{folder}' holds no run: expected {CONFIG} or the folders {' and '.join(STAGES)}. "
            "Give the OUTPUT_DIR of a training."
        )
    stages = [_stage(os.path.join(folder, name), name, settings) for name in present]
    facts = stored_results(folder, FACTS)
    measured = {
        sam_adaptation.ITEM: stored_results(folder, sam_adaptation.RESULT),
        sam_quality.ITEM: stored_results(f"{folder}/teacher", sam_quality.RESULT),
        gate.ITEM: stored_results(f"{folder}/student", gate.RESULT),
    }
    facts |= {item: found["text"] for item, found in measured.items() if "text" in found}
    return Run(
        name=os.path.basename(os.path.abspath(folder)),
        stages=stages,
        settings=settings,
        config=config,
        facts=[(name, str(text)) for name, text in facts.items()],
        pictures=pictures_of(
            [(stage.title, os.path.join(folder, stage.name, FOLDER)) for stage in reversed(stages)],
            [("What happens to an image in stage 2", os.path.join(folder, OVERVIEW))],
        ),
        problem=problem,
        written=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    )


def _stage(folder: str, name: str, settings: Settings) -> Stage:
    own = 0 if name == "student" else settings.count(f"S4M.{name.upper()}.MAX_ITER")
    results = stored_results(folder)
    finished = os.path.isfile(os.path.join(folder, FINAL_CHECKPOINT))
    done = results.get(ITERATIONS) if finished else 0
    return Stage(
        name=name,
        curves=read_curves(os.path.join(folder, METRICS)),
        results=results,
        iterations=done or own or settings.count("SOLVER.MAX_ITER"),
        burn_in=settings.count("S4M.BURN_IN") if name == "student" else 0,
        finished=finished,
    )
