"""What a page shows of a run, before it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s4m_d2.report.curves import Curves
from s4m_d2.report.pictures import Picture
from s4m_d2.report.settings import Settings

MASKS = "segm"  # Detectron2's name for results on masks
OF_TEACHER = "teacher"  # under which the student's results hold the EMA teacher's
TITLES = {"teacher": "Stage 1: teacher", "student": "Stage 2: student"}


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
        problem: a file that could not be read, in words.
    """

    name: str
    curves: Curves
    results: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 0
    burn_in: int = 0
    finished: bool = False
    problem: str = ""

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def done(self) -> int:
        """Iterations that were trained, as far as the records tell."""
        if self.finished and self.iterations:
            return self.iterations
        last = self.curves.last_iteration
        done = 0 if last is None else last + 1
        return min(done, self.iterations) if self.iterations else done

    @property
    def progress(self) -> str:
        whole = f" of {self.iterations:,}" if self.iterations else ""
        return f"{self.done:,}{whole} iterations{', finished' if self.finished else ''}"

    def models(self) -> Iterator[tuple[str, Mapping[str, float | None]]]:
        """Each evaluated model's name and its mask AP, for each data set if there are several."""

        def with_masks(results: Mapping[str, Any], path: tuple[str, ...]) -> Iterator:
            for key, value in results.items():
                if key == MASKS and isinstance(value, Mapping):
                    yield self.model_name(path), value
                elif isinstance(value, Mapping):
                    yield from with_masks(value, (*path, str(key)))

        return with_masks(self.results, ())

    def model_name(self, path: Sequence[str]) -> str:
        """The name of a model and, if there are several data sets, of the data set.

        Args:
            path: of its results on masks within all results of the stage.
        """
        is_ema = tuple(path[:1]) == (OF_TEACHER,)
        own = "stage-1 teacher" if self.name == "teacher" else "student"
        return ", ".join(filter(None, ("EMA teacher" if is_ema else own, "/".join(path[is_ema:]))))


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
        stage, weights = self.settings.get("S4M.STAGE"), self.settings.get("S4M.TEACHER_WEIGHTS")
        without = {"teacher": stage == "student" or weights, "student": stage == "teacher"}
        return [name for name in TITLES if not without[name]]

    @property
    def complete(self) -> bool:
        finished = {stage.name for stage in self.stages if stage.finished}
        return bool(finished) and finished >= set(self.expected)

    @property
    def missing(self) -> list[str]:
        """Stages that the config asks for, and that have not begun."""
        return [name for name in self.expected if name not in {s.name for s in self.stages}]
