"""What a file of annotations holds beside usable instances, collected for one report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from s4m_d2.errors import DatasetError

CROWDS = "crowds (iscrowd 1)"
_SHOWN = 3  # offenders that a message names
_MANY_CROWDS = 0.1  # of all instances: more are probably meant otherwise

_Kinds = Mapping[tuple[str, str], Sequence[str]]  # (text, remedy) → names of the offenders


class Findings:
    """Counts by kind, the first few offenders named.

    Attributes:
        instances: how many are used.
        notes: what was read otherwise than it is written.
    """

    def __init__(self) -> None:
        self.instances = 0
        self.notes: list[str] = []
        self._left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._refused: dict[tuple[str, str], list[str]] = defaultdict(list)

    def leave_out(self, text: str, name: str, remedy: str) -> None:
        """Count what is no target; a message puts its number before ``text``."""
        self._left_out[text, remedy].append(name)

    def refuse(self, text: str, name: object, remedy: str) -> None:
        """Count what makes the file unusable."""
        self._refused[text, remedy].append(str(name))

    @property
    def summary(self) -> str:
        """What was left out and what was read otherwise, short; "" for a file as it should be."""
        counts = [f"{len(names):,} {text}" for (text, _), names in self._left_out.items()]
        return "; ".join([f"no targets: {', '.join(counts)}"] * bool(counts) + self.notes)

    @property
    def warnings(self) -> list[str]:
        """A message for each kind that was left out, crowds only where they are many."""
        crowds = sum(len(names) for (text, _), names in self._left_out.items() if text == CROWDS)
        usual = crowds <= _MANY_CROWDS * (crowds + self.instances)
        return _messages(
            {k: n for k, n in self._left_out.items() if not (k[0] == CROWDS and usual)}
        )

    def problems(self) -> list[str]:
        """All that makes the file unusable."""
        if not self._refused and self._left_out and not self.instances:
            return [f"no instance can be used. {' '.join(_messages(self._left_out))}"]
        return _messages(self._refused)

    def raise_for(self, json_file: str) -> None:
        """Raise one DatasetError for all of these."""
        problems = self.problems()
        if len(problems) == 1:
            raise DatasetError(f"{json_file}: {problems[0]}")
        if problems:
            lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
            raise DatasetError(f"{json_file}: {len(problems)} problems:", *lines)


def _messages(kinds: _Kinds) -> list[str]:
    messages = []
    for (text, remedy), names in kinds.items():
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN])
        messages.append(f"{len(names):,} {text}: {shown}{more}. {remedy}".strip())
    return messages
