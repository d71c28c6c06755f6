"""What a page shows of a run, before it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s4m_d2.report.curves import LARGEST, Curves
from s4m_d2.report.pictures import Picture

MASKS = "segm"  # Detectron2's name for results on masks
OF_TEACHER = "teacher"  # under which the student's results hold the EMA teacher's
LARGEST_SETTING = 10**15  # counts of a config beyond it are mistakes


def finite(value: Any) -> float | None:
    """A number, None for what is none or as good as infinite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) <= LARGEST else None


def stage_title(name: str) -> str:
    return "Stage 1: teacher" if name == "teacher" else "Stage 2: student"


class Settings:
    """A config as plain dicts; what is not there is not known.

    >>> Settings({"SOLVER": {"MAX_ITER": 5}}).get("SOLVER.MAX_ITER")
    5
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values = values or {}

    def get(self, key: str, default: Any = None) -> Any:
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def number(self, key: str) -> float:
        """A key's number, 0 for one that is not known, no number or absurdly large."""
        value = self.get(key, 0)
        number = finite(value)
        return value if number is not None and abs(number) <= LARGEST_SETTING else 0


@dataclass
class Stage:
    """One of the two trainings.

    Attributes:
        name: "teacher" or "student".
        curves: of its metrics.json.
        results: of its last evaluation, as Detectron2 nests them; empty: none.
        iterations: of the whole stage; 0: not known.
        burn_in: of stage 2.
        finished: whether its last checkpoint is there.
        problems: files that could not be read, in words.
    """

    name: str
    curves: Curves
    results: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 0
    burn_in: int | None = None
    finished: bool = False
    problems: Sequence[str] = ()

    @property
    def title(self) -> str:
        return stage_title(self.name)

    @property
    def done(self) -> int:
        """Iterations that were trained, as far as the records tell."""
        if self.finished and self.iterations:
            return self.iterations
        last = self.curves.last_iteration
        done = 0 if last is None else last + 1
        return min(done, self.iterations) if self.iterations else done

    def models(self) -> Iterator[tuple[str, Mapping[str, float | None]]]:
        """Each evaluated model's name and its mask AP, for each data set if there are several."""
        for path, values in _with_masks(self.results, ()):
            yield self.model_name(path), values

    def model_name(self, path: Sequence[str]) -> str:
        """The name of a model and, if there are several data sets, of the data set.

        Args:
            path: of its results on masks within all results of the stage.
        """
        is_ema = tuple(path[:1]) == (OF_TEACHER,)
        own = "stage-1 teacher" if self.name == "teacher" else "student"
        dataset = "/".join(path[is_ema:])
        return ", ".join(filter(None, ("EMA teacher" if is_ema else own, dataset)))


@dataclass
class Run:
    """Everything that a page shows.

    Attributes:
        name: of the run.
        stages: those that have a folder.
        settings: of its config.
        config: the file itself; empty: there is none.
        facts: (name, text) of the checks before training and of the environment.
        pictures: the gallery.
        problem: why it ended before its end; empty: it did not, or that is not known.
        written: when the page was made.
    """

    name: str
    stages: Sequence[Stage] = ()
    settings: Settings = field(default_factory=Settings)
    config: str = ""
    facts: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    problem: str = ""
    written: str = ""

    @property
    def expected(self) -> list[str]:
        """The names of the stages that the config asks for."""
        teacher = self.settings.get("S4M.STAGE") != "student"
        teacher = teacher and not self.settings.get("S4M.TEACHER_WEIGHTS")
        return ["teacher"] * teacher + ["student"] * (self.settings.get("S4M.STAGE") != "teacher")

    @property
    def complete(self) -> bool:
        finished = {stage.name for stage in self.stages if stage.finished}
        return bool(finished) and finished >= set(self.expected)


def _with_masks(
    results: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, float | None]]]:
    """Every place of nested results that has results on masks."""
    for key, value in results.items():
        if key == MASKS and isinstance(value, Mapping):
            yield path, value
        elif isinstance(value, Mapping):
            yield from _with_masks(value, (*path, str(key)))
