"""Users' mistakes: messages name the input, what was expected, and the remedy. Others are bugs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


def printable(text: str, most: int = 2000) -> str:
    """Make a text one printable line, for terminals, logs and pages; names may have any characters.

    Characters that are not printable are escaped, also lone surrogates. Of a text with more than
    ``most`` characters, the middle is cut.

    >>> print(printable("two\\nlines, \\x1b[31mred, \\udcff"), printable("x" * 99, most=5))
    two\\nlines, \\x1b[31mred, \\udcff xx…xx
    """
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_names(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first names, and count the others.

    >>> first_names(["a", "b", "c", "d"], most=2)
    'a, b and 2 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def first_of(messages: Sequence[str]) -> str:
    """The first of several messages, with the number of the others."""
    more = f" ({len(messages) - 1} more like this.)" if len(messages) > 1 else ""
    return messages[0] + more


def numbered(items: Iterable[object]) -> list[str]:
    """The texts of these, each after its number."""
    return [f"{number}. {item}" for number, item in enumerate(items, start=1)]


class S4MError(Exception):
    """Base of all errors that the user can correct; each line is made :func:`printable`."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(printable(line) for line in lines))


class ConfigError(S4MError, ValueError):
    """A config key is unknown, of the wrong type, out of range or contradicts another."""


def require(key: str, value: Any, is_valid: bool, expected: str) -> None:
    """ConfigError unless the value of a config key is valid; ``expected`` says which are."""
    if not is_valid:
        raise ConfigError(f"{key} is {value!r}; expected {expected}")


def registered(registry: Any, key: str, name: str) -> Any:
    """Look up the entry of a registry that a config key names; ConfigError: there is none."""
    if name not in registry:
        known = ", ".join(sorted(entry for entry, _ in registry))
        raise ConfigError(f"{key} is {name!r}, which is not registered; choose from: {known}")
    return registry.get(name)


class DatasetError(S4MError, ValueError):
    """A data set, image, annotation or list of file names is missing or malformed."""


class WeightsError(S4MError, ValueError):
    """A checkpoint (model, backbone or SAM) is missing, damaged, unsafe or of another model."""


class DivergenceError(S4MError, FloatingPointError):
    """Training diverged: losses or gradients are not finite."""


class OutputError(S4MError, OSError):
    """A file cannot be written: the disk is full, read-only or not the user's."""


class WorkerError(S4MError, RuntimeError):
    """Another process of the run has died: killed, or out of memory."""


class InputError(S4MError, ValueError):
    """An argument of a public function has the wrong shape, dtype or range."""


@dataclass(frozen=True)
class Finding:
    """One line of a report of checks."""

    item: str  #: what was checked
    text: str  #: short description
    errors: Sequence[S4MError] = ()  #: why the run cannot work
    warnings: Sequence[str] = ()  #: possible mistakes, or problems later; in the same form

    @property
    def status(self) -> str:
        """Status of the line: "ok", "warning" or "error"."""
        return "error" if self.errors else "warning" if self.warnings else "ok"


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
        lines = "\n".join(numbered(errors)).split("\n")
        raise type(errors[0])(f"{len(errors)} problems:", *lines)
