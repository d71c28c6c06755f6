"""What a COCO file holds beside usable instances, collected for one report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from s4m_d2.errors import DatasetError

_SHOWN = 3  # offenders that a message names
_MANY_CROWDS = 0.1  # of all instances: more are probably meant otherwise


@dataclass(frozen=True)
class Kind:
    """A kind of finding: a short name, what is said behind its count, and what follows from it."""

    short: str
    text: str
    remedy: str


NO_MASK = Kind(
    "without a mask",
    "annotations have no mask, a box at most, and are left out",
    "Draw masks for them, or remove them.",
)
NO_PIXEL = Kind(
    "without a pixel in their image",
    "masks have no pixel in their image and are left out",
    "Coordinates from 0 to 1 have to be multiplied by the image's width and height; others are "
    "those of another image, or of one of another size.",
)
NO_IMAGE = Kind(
    "of images that are not listed",
    "annotations are of images that the file does not list and are left out",
    "List these images, or remove the annotations.",
)
PARTS = Kind(
    "polygons of less than three points",
    "polygons have less than three points (x, y) and are left out",
    "Complete or remove them.",
)
CROWD = Kind(
    "crowds",
    "instances are crowds (iscrowd 1), which nothing is learned from",
    "Set iscrowd to 0 where each is one object.",
)


class Findings:
    """What a file holds beside usable instances, counted by kind, the first few named."""

    def __init__(self) -> None:
        self.notes: list[str] = []  # what was read otherwise than it is written
        self.left_out: dict[Kind, list[str]] = defaultdict(list)
        self.errors: dict[Kind, list[str]] = defaultdict(list)
        self.instances = 0  # that are used

    def refuse(self, text: str, name: object, remedy: str) -> None:
        self.errors[Kind(text, text, remedy)].append(str(name))

    @property
    def summary(self) -> str:
        """What was left out and what was read otherwise, short; "" for a file as it should be."""
        counts = [f"{len(names):,} {kind.short}" for kind, names in self.left_out.items()]
        return "; ".join([f"no targets: {', '.join(counts)}"] * bool(counts) + self.notes)

    @property
    def warnings(self) -> list[str]:
        """A message for each kind that was left out, crowds only where they are many."""
        crowds = len(self.left_out.get(CROWD, ()))
        usual = crowds <= _MANY_CROWDS * (crowds + self.instances)
        shown = {k: names for k, names in self.left_out.items() if not (k is CROWD and usual)}
        return [_message(kind, names) for kind, names in shown.items()]

    def problems(self) -> list[str]:
        """All that makes the file unusable."""
        problems = [_message(kind, names) for kind, names in self.errors.items()]
        if not problems and self.left_out and not self.instances:
            reasons = [_message(kind, names) for kind, names in self.left_out.items()]
            return [f"no instance can be used. {' '.join(reasons)}"]
        return problems

    def raise_for(self, json_file: str) -> None:
        """Raise one DatasetError for all of these."""
        problems = self.problems()
        if len(problems) == 1:
            raise DatasetError(f"{json_file}: {problems[0]}")
        if problems:
            lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
            raise DatasetError(f"{json_file}: {len(problems)} problems:", *lines)


def _message(kind: Kind, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{len(names):,} {kind.text}: {', '.join(names[:_SHOWN])}{more}. {kind.remedy}".strip()
