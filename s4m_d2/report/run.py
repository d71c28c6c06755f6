"""Contents of a report: stages, settings, and reduced pictures."""

from __future__ import annotations

import base64
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image

from s4m_d2.report.curves import Curves

logger = logging.getLogger(__name__)

MASKS = "segm"  # Detectron2's name for results on masks
OF_TEACHER = "teacher"  # key of the EMA teacher's results in the student's
TITLES = {
    "teacher": "Stage 1: teacher",
    "student": "Stage 2: student",
    "finetune": "Last stage: fine-tuning",
}
MODELS = {"teacher": "stage-1 teacher", "student": "student", "finetune": "fine-tuned student"}
FINETUNE = "S4M.FINETUNE.MAX_ITER"
MOST_PICTURES = 14
MOST_SIDE = 1600  # px; larger pictures are reduced
JPEG_QUALITY = 85
# Titles of figures, in the order of the gallery.
FIGURES = {
    "predictions": "predictions",
    "pseudo_labels": "pseudo-labels",
    "arp": "ARP",
    "similarity": "similarity to a point",
    "views": "views of unlabeled images",
    "labeled": "labeled images and augmentation",
}
_NUMBERED = re.compile(r"(.+?)_(\d{7,})\.png")
# Shown if known and not empty; the page contains the whole config too.
SHOWN = """
    MODEL.META_ARCHITECTURE MODEL.BACKBONE.NAME MODEL.RESNETS.DEPTH MODEL.TIMM.NAME
    S4M.DATA.LABELED S4M.DATA.UNLABELED S4M.DATA.VAL
    DATASETS.TRAIN DATASETS.UNLABELED DATASETS.TEST
    S4M.STAGE S4M.TEACHER_WEIGHTS S4M.TEACHER.MAX_ITER S4M.TEACHER.IMS_PER_BATCH
    S4M.FINETUNE.MAX_ITER S4M.FINETUNE.BASE_LR
    SOLVER.MAX_ITER SOLVER.IMS_PER_BATCH S4M.UNLABELED_IMS_PER_BATCH S4M.BURN_IN S4M.EMA_DECAY
    SOLVER.OPTIMIZER SOLVER.BASE_LR SOLVER.LR_SCHEDULER_NAME
    S4M.DISTILL.ENABLED S4M.DISTILL.WEIGHT S4M.REFINE.ENABLED S4M.REFINE.METHOD
    S4M.ARP.ENABLED S4M.ARP.RANDOM_PLACEMENT S4M.PSEUDO_LABEL.SCORE_THRESH S4M.UNSUP_LOSS_WEIGHT
    S4M.SAM.BACKEND S4M.SAM.CHECKPOINT
    MODEL.DEVICE SOLVER.AMP.ENABLED S4M.AMP_PRECISION SEED
""".split()


class Settings:
    """The settings of a run's config, a nested dictionary; missing ones are unknown.

    >>> settings = Settings({"SOLVER": {"MAX_ITER": 5, "STEPS": []}})
    >>> settings.get("SOLVER.MAX_ITER"), settings.get("SOLVER.AMP.ENABLED")
    (5, None)
    """

    def __init__(self, values: Any = None) -> None:
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def count(self, key: str) -> int:
        """A number of iterations; 0: unknown."""
        value = self.get(key)
        return value if isinstance(value, int) else 0

    def shown(self) -> list[tuple[str, str]]:
        """(key, text) of the settings to show."""
        values = {key: self.get(key) for key in SHOWN}
        texts = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
        return [(key, str(text)) for key, text in texts.items() if text not in (None, "")]


@dataclass
class Stage:
    """One of the trainings of a run."""

    name: str  #: a key of TITLES
    curves: Curves  #: of its metrics.json
    #: Of its last evaluation, nested as by Detectron2; empty: none.
    results: Mapping[str, Any] = field(default_factory=dict)
    iterations: int = 0  #: of the whole stage; 0: unknown
    burn_in: int = 0  #: of stage 2
    finished: bool = False  #: whether its final checkpoint exists

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def model(self) -> str:
        """Name of the trained model."""
        return MODELS[self.name]

    @property
    def done(self) -> int:
        """Number of trained iterations, from the records."""
        return (self.finished and self.iterations) or self.curves.iterations

    @property
    def progress(self) -> str:
        whole = f" of {self.iterations:,}" if self.iterations else ""
        return f"{self.done:,}{whole} iterations{', finished' if self.finished else ''}"

    def models(self) -> Iterator[tuple[str, Mapping[str, float | None]]]:
        """Name and mask AP of each evaluated model, for each data set if there are several."""

        def with_masks(results: Mapping[str, Any], path: tuple[str, ...]) -> Iterator:
            for key, value in results.items():
                if key == MASKS and isinstance(value, Mapping):
                    yield self.model_name(path), value
                elif isinstance(value, Mapping):
                    yield from with_masks(value, (*path, str(key)))

        return with_masks(self.results, ())

    def model_name(self, path: Sequence[str]) -> str:
        """Name of a model and, if there are several data sets, of the data set.

        Args:
            path: keys of its mask results in the results of the stage.
        """
        is_ema = tuple(path[:1]) == (OF_TEACHER,)
        name = "EMA teacher" if is_ema else self.model
        return ", ".join(filter(None, (name, "/".join(path[is_ema:]))))


class Picture(NamedTuple):
    """A picture of the gallery; ``uri`` contains its data."""

    title: str
    uri: str
    size: tuple[int, int]  # (width, height) px


def pictures_of(
    folders: Iterable[tuple[str, str]], files: Iterable[tuple[str, str]] = ()
) -> list[Picture]:
    """Read the latest figure of each kind, up to MOST_PICTURES; unreadable ones are left out.

    Args:
        folders: (title, folder of NAME_ITERATION.png) of each stage.
        files: (title, path) of other pictures, first.
    """
    found = [(title, path) for title, path in files if os.path.isfile(path)]
    for stage, folder in folders:
        found += [(f"{stage} · {title}", path) for title, path in _latest(folder)]
    pictures: dict[str, Picture] = {}  # by content: stages share what does not depend on models
    for title, path in found:
        try:
            uri, shape = _jpeg(path)
        except (OSError, ValueError, SyntaxError) as error:
            logger.warning("The picture '%s' is left out of the report: %s", path, error)
        else:
            pictures.setdefault(uri, Picture(title, uri, shape))
    return list(pictures.values())[:MOST_PICTURES]


def _latest(folder: str) -> Iterator[tuple[str, str]]:
    """(title, path) of the latest figure of each kind, in the gallery's order."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    numbered = filter(None, map(_NUMBERED.fullmatch, names))
    latest = {m[1]: m for m in sorted(numbered, key=lambda m: int(m[2]))}
    for kind, title in FIGURES.items():
        if match := latest.get(kind):
            yield f"{title} after {int(match[2]):,} iterations", os.path.join(folder, match[0])


def _jpeg(path: str) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI, and its (width, height)."""
    with Image.open(path, formats=("PNG",)) as file:  # others may start programs
        picture = file.convert("RGB")
    picture.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    text = base64.b64encode(content.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{text}", picture.size


@dataclass
class Run:
    """Everything that a page shows."""

    name: str
    stages: Sequence[Stage] = ()  #: those with a folder
    settings: Settings = field(default_factory=Settings)
    config: str = ""  #: text of the config file; "": missing
    facts: Sequence[tuple[str, str]] = ()  #: (name, text) of checks and environment
    pictures: Sequence[Picture] = ()
    problem: str = ""  #: why the run ended early; "": it did not
    written: str = ""  #: time at which the page was made

    @property
    def complete(self) -> bool:
        """Whether every stage that the config asks for is trained to its end."""
        stage, weights = self.settings.get("S4M.STAGE"), self.settings.get("S4M.TEACHER_WEIGHTS")
        without = {"teacher": stage == "student" or weights, "student": stage == "teacher"}
        without["finetune"] = stage == "teacher" or not self.settings.count(FINETUNE)
        finished = {stage.name for stage in self.stages if stage.finished}
        return finished >= {name for name in TITLES if not without[name]}
