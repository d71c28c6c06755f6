"""What log.txt says of a run: its checks before training, versions, and the commit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGE = "s4m_d2"
CHECKED = "Checked before training:"  # train_net.py's line before the table of the checks
ENVIRONMENT = "Environment info:"  # Detectron2's line before its table
VERSION = "s4m_d2 of this run:"  # the line with it
GIT_SECONDS = 5  # to wait for git at most
_SHOWN = ("platform", "Python", "detectron2", "PyTorch", "torchvision", "numpy", "GPU 0")
_LOG_LINE = re.compile(r"\[\d\d/\d\d \d\d:\d\d:\d\d\]")
_COLUMNS = re.compile(r"-+( +-+)+")


def code_version() -> str:
    """The package's version and, in a clone of the repository, its commit."""
    version = sys.modules[PACKAGE].__version__
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=10",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return version
    commit = done.stdout.strip()
    return version if done.returncode or not commit else f"{version}, commit {commit}"


def log_facts(path: str) -> list[tuple[str, str]]:
    """(name, text) of the last checks before training and of the environment, from a log."""
    tables: dict[str, list[str]] = {}
    version, open_table = "", None
    for line in _lines(path):
        if _LOG_LINE.match(line):
            open_table = next((key for key in (CHECKED, ENVIRONMENT) if key in line), None)
            if open_table:
                tables[open_table] = []
            if VERSION in line:
                version = line.split(VERSION, 1)[1].strip()
        elif open_table:
            tables[open_table].append(line.rstrip("\n"))
    facts = []
    for item, text, *status in _rows(tables.get(CHECKED, ())):
        marked = f" ({status[0]})" if status and status[0] not in ("ok", "") else ""
        facts.append((item, text + marked))
    facts += [("s4m_d2", version)] if version else []
    for item, text, *_ in _rows(tables.get(ENVIRONMENT, ())):
        if item.split(",")[0] in _SHOWN:
            facts.append((item, text))
    return facts


def _rows(lines: Sequence[str]) -> Iterator[list[str]]:
    """The cells of a table whose columns stand under a line of dashes; wrapped ones are joined."""
    spans: list[tuple[int, int | None]] = []
    row: list[str] = []
    for line in lines:
        if _COLUMNS.fullmatch(line.strip()) and "--" in line:
            if spans:
                break  # the line below the table
            starts = [match.start() for match in re.finditer("-+", line)]
            spans = list(zip(starts, [*starts[1:], None], strict=True))
        elif spans:
            cells = [line[start:end].strip() for start, end in spans]
            if cells[0] and row:
                yield row
            if cells[0] or not row:
                row = cells
            else:
                row = [" ".join(filter(None, pair)) for pair in zip(row, cells, strict=True)]
    if row:
        yield row


def _lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """The lines of a text file, none if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:
        return
