"""Helpers of the commands: types of options, and the list of images with problems."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence

from s4m_d2.errors import printable

MOST_PROBLEMS = 20  # printed
MOST_WORKERS = 8  # unless more are asked for


def positive(text: str) -> int:
    """Type of an option: whole number >= 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Type of an option: whole number >= 0."""
    return _whole(text, 0)


def share(text: str) -> float:
    """Type of an option: number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def default_workers() -> int:
    """Number of threads for reading small files."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def print_problems(problems: Mapping[str, str], what: str) -> None:
    """Print to standard error how many images ``what`` applies to, which and why."""
    if not problems:
        return
    print(f"{len(problems)} image{'s' * (len(problems) != 1)} {what}:", file=sys.stderr)
    print_first([f"{name}: {problem}" for name, problem in problems.items()])


def print_first(lines: Sequence[str]) -> None:
    """Print the first lines to standard error, and how many more there are."""
    for line in lines[:MOST_PROBLEMS]:
        print(f"  {printable(line)}", file=sys.stderr)
    if len(lines) > MOST_PROBLEMS:
        print(f"  and {len(lines) - MOST_PROBLEMS} more", file=sys.stderr)
