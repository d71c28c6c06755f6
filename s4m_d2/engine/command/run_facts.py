"""OUTPUT_DIR/run.json: what a run was started with, for its report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import detectron2
import numpy
import torch
import torchvision

from s4m_d2.engine.checks.findings import Finding
from s4m_d2.report import write_results

FACTS = "run.json"
GIT_SECONDS = 5  # to wait for git at most
_LIBRARIES = (detectron2, torch, torchvision, numpy)


def write_facts(folder: str, findings: Iterable[Finding] = ()) -> dict[str, str]:
    """Write what the checks before training found, and versions, by their names.

    Raises:
        OutputError: the system refuses to write.
    """
    facts: dict[str, str] = {}
    for f in findings:  # some have the same name
        text = f.text + f" ({f.status})" * (f.status != "ok")
        facts[f.item] = f"{facts[f.item]}; {text}" if f.item in facts else text
    facts |= dict(_versions())
    write_results(facts, os.path.join(folder, FACTS))
    return facts


def _versions() -> Iterator[tuple[str, str]]:
    yield "s4m_d2", code_version()
    yield "platform", platform.platform()
    yield "Python", platform.python_version()
    for library in _LIBRARIES:
        yield library.__name__, library.__version__
    if torch.cuda.is_available():
        yield "GPU", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"


def code_version() -> str:
    """The package's version and, in a clone of the repository, its commit."""
    package = sys.modules["s4m_d2"]  # which parts of it do not import
    version, root = package.__version__, Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return version
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=10"], capture_output=True, text=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return version
    commit = done.stdout.strip()
    return version if done.returncode or not commit else f"{version}, commit {commit}"
