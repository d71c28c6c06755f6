"""Problems of a file of annotations, collected for one report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from s4m_d2.errors import DatasetError, first_names

CROWDS = "crowds (iscrowd 1)"
_SHOWN = 3  # names in a message
_MANY_CROWDS = 0.1  # share of all instances from which on crowds are probably a mistake


class Findings:
    """Annotations that are not used or not usable, by kind, with names.

    Attributes:
        instances: number of usable instances.
        notes: corrections made while reading.
    """

    def __init__(self) -> None:
        self.instances = 0
        self.notes: list[str] = []
        # (text, remedy) → names of the offenders
        self._left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._refused: dict[tuple[str, str], list[str]] = defaultdict(list)

    @classmethod
    def joined(cls, parts: Mapping[str, Findings]) -> Findings:
        """Those of several files that can be used, by the files' names."""
        found = cls()
        for file, part in parts.items():
            found.instances += part.instances
            found.notes += [f"{file}: {note}" for note in part.notes]
            for kind, names in part._left_out.items():
                found._left_out[kind] += [f"{name} of {file}" for name in names]
        return found

    def leave_out(self, text: str, name: str, remedy: str) -> None:
        """Add an annotation that is not a target; messages put the count before ``text``."""
        self._left_out[text, remedy].append(name)

    def refuse(self, text: str, name: str, remedy: str) -> None:
        """Add a problem that makes the file unusable."""
        self._refused[text, remedy].append(name)

    @property
    def summary(self) -> str:
        """Counts of annotations left out, and notes; "" if there are none."""
        counts = [f"{len(names):,} {text}" for (text, _), names in self._left_out.items()]
        return "; ".join([f"no targets: {', '.join(counts)}"] * bool(counts) + self.notes)

    @property
    def warnings(self) -> list[str]:
        """A message for each kind that was left out; for crowds only if there are many."""
        crowds = sum(len(names) for (text, _), names in self._left_out.items() if text == CROWDS)
        if crowds > _MANY_CROWDS * (crowds + self.instances):
            return _messages(self._left_out)
        return _messages({k: names for k, names in self._left_out.items() if k[0] != CROWDS})

    def problems(self) -> list[str]:
        """Messages of all problems that make the file unusable."""
        if not self._refused and self._left_out and not self.instances:
            return [f"no instance can be used. {' '.join(_messages(self._left_out))}"]
        return _messages(self._refused)

    def raise_for(self, json_file: str) -> None:
        """Raise one DatasetError for all problems."""
        problems = self.problems()
        if len(problems) == 1:
            raise DatasetError(f"{json_file}: {problems[0]}")
        if problems:
            lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
            raise DatasetError(f"{json_file}: {len(problems)} problems:", *lines)


def _messages(kinds: Mapping[tuple[str, str], Sequence[str]]) -> list[str]:
    return [
        f"{len(names):,} {text}: {first_names(names, _SHOWN)}. {remedy}".strip()
        for (text, remedy), names in kinds.items()
    ]
