"""Findings of checks: one table, then every problem with its remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tabulate import tabulate

from s4m_d2.errors import S4MError, printable

_T = TypeVar("_T")
_FINDING_WIDTH = 76  # characters of the table's middle column


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    item: str  #: what was checked
    text: str  #: short description
    errors: Sequence[S4MError] = ()  #: why the run cannot work; each ends with a remedy
    warnings: Sequence[str] = ()  #: possible mistakes, or problems later; in the same form

    @property
    def status(self) -> str:
        """Status of the line: "ok", "warning" or "error"."""
        return "error" if self.errors else "warning" if self.warnings else "ok"


@dataclass(frozen=True)
class PreflightReport:
    """Findings in the order of the checks; ``str`` gives the table and the list of problems."""

    findings: Sequence[Finding]

    @property
    def errors(self) -> list[S4MError]:
        return [error for finding in self.findings for error in finding.errors]

    def __str__(self) -> str:
        texts = (textwrap.fill(printable(f.text), _FINDING_WIDTH) for f in self.findings)
        rows = [(f.item, text, f.status) for f, text in zip(self.findings, texts, strict=True)]
        problems = [f"Error: {error}" for error in self.errors]
        warnings = dict.fromkeys(w for f in self.findings for w in f.warnings)  # each once
        problems += [f"Warning: {printable(warning)}" for warning in warnings]
        return "\n".join([tabulate(rows, ("item", "finding", "status")), *_numbered(problems)])


def _numbered(what: Iterable[object]) -> list[str]:
    return [f"{number}. {item}" for number, item in enumerate(what, start=1)]


def attempt(build: Callable[..., _T], *args: Any) -> tuple[_T | None, list[S4MError]]:
    """What a call returns, and the S4MError that it raises instead of that (None), if it does."""
    try:
        return build(*args), []
    except S4MError as error:
        return None, [error]


def raise_all(errors: Iterable[S4MError]) -> None:
    """Raise one error of the first one's type with the messages of all, if there are any."""
    errors = list(errors)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "\n".join(_numbered(errors)).split("\n")
        raise type(errors[0])(f"{len(errors)} problems:", *lines)


def first_of(what: Sequence[str]) -> str:
    """The first of several messages, with the number of the others."""
    more = f" ({len(what) - 1} more like this.)" if len(what) > 1 else ""
    return what[0] + more


def in_units(size: float) -> str:
    """Format bytes in powers of 1024.

    >>> in_units(1536), in_units(3 * 1024**3)
    ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
