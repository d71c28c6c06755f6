"""A run as its page shows it, read from the files in its output folder."""

from __future__ import annotations

import base64
import datetime
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from s4m_d2.errors import DatasetError
from s4m_d2.report.curves import read_curves, stored_results

logger = logging.getLogger(__name__)

FACTS, CONFIG = "run.json", "config.yaml"  # in OUTPUT_DIR
# Measurements and decisions with a line "text": name on the page, file in OUTPUT_DIR.
MEASURED = {
    "SAM's adaptation": "sam_adapted.json",
    "SAM's masks": "teacher/sam_quality.json",
    "refinement gate": "student/refinement_gate.json",
}
TITLES = {  # by folder
    "teacher": "Stage 1: teacher",
    "student": "Stage 2: student",
    "finetune": "Last stage: fine-tuning",
}
MODELS = {"teacher": "stage-1 teacher", "student": "student", "finetune": "fine-tuned student"}
MASKS = "segm"  # Detectron2's name for results on masks
OF_TEACHER = "teacher"  # key of the EMA teacher's results in the student's
MOST_PICTURES = 14
MOST_SIDE = 1600  # px; larger pictures are reduced
JPEG_QUALITY = 85
# Titles of figures, in the order of the gallery.
FIGURES = {
    "pseudo_labels": "pseudo-labels, and the way to them",
    "predictions": "predictions",
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


class Stage:
    """One of the trainings of a run, read from its folder, named by a key of TITLES."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        def iterations(key: str) -> int:
            value = settings.get(key)
            return value if isinstance(value, int) else 0

        self.name = folder.name
        self.curves = read_curves(folder / "metrics.json")
        self.results = stored_results(folder / "results.json")  # nested as by Detectron2
        self.finished = (folder / "model_final.pth").is_file()
        done = self.results.get("iterations") if self.finished else 0
        own = 0 if self.name == "student" else iterations(f"S4M.{self.name.upper()}.MAX_ITER")
        self.iterations = done or own or iterations("SOLVER.MAX_ITER")  # 0: unknown
        self.burn_in = iterations("S4M.BURN_IN") if self.name == "student" else 0

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
        """Name of the model and, if there are several, data set with mask results at these keys."""
        is_ema = tuple(path[:1]) == (OF_TEACHER,)
        name = "EMA teacher" if is_ema else self.model
        return ", ".join(filter(None, (name, "/".join(path[is_ema:]))))


class Picture(NamedTuple):
    """A picture of the gallery; ``uri`` contains its data."""

    title: str
    uri: str
    size: tuple[int, int]  # (width, height) px


class Run:
    """Everything that a page shows; what is missing or damaged is left out.

    Args:
        output_dir: folder of the run.
        problem: why it ended early; "": it did not.

    Raises:
        DatasetError: the folder contains no run.
    """

    def __init__(self, output_dir: str, problem: str = "") -> None:
        folder = Path(output_dir)
        self.name, self.problem = os.path.basename(os.path.abspath(output_dir)), problem
        self.config = ""  # the file's text
        self.settings: dict[str, Any] = {}  # by dotted key
        with suppress(OSError):
            self.config = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        with suppress(Exception):  # PyYAML raises many kinds
            self.settings = dict(_by_key(yaml.safe_load(self.config)))
        present = [name for name in TITLES if (folder / name).is_dir()]
        if not self.config and not present:
            raise DatasetError(
                f"'{output_dir}' holds no run: expected {CONFIG} or the folders "
                f"{' and '.join(TITLES)}. Give the OUTPUT_DIR of a training."
            )
        self.stages = [Stage(folder / name, self.settings) for name in present]
        self.facts = stored_results(folder / FACTS)  # findings of checks, measurements, versions
        for name, file in MEASURED.items():
            if text := stored_results(folder / file).get("text"):
                self.facts[name] = text
        self.pictures = _pictures(folder, present)
        self.written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")

    def shown_settings(self) -> list[tuple[str, str]]:
        """(key, text) of the settings to show."""
        values = [(key, self.settings.get(key)) for key in SHOWN]
        texts = [(k, ", ".join(map(str, v)) if isinstance(v, list) else v) for k, v in values]
        return [(key, str(text)) for key, text in texts if text not in (None, "")]

    @property
    def complete(self) -> bool:
        """Whether every stage that the config asks for is trained to its end."""
        stage, weights = self.settings.get("S4M.STAGE"), self.settings.get("S4M.TEACHER_WEIGHTS")
        without = {"teacher": stage == "student" or weights, "student": stage == "teacher"}
        without["finetune"] = stage == "teacher" or not self.settings.get("S4M.FINETUNE.MAX_ITER")
        finished = {stage.name for stage in self.stages if stage.finished}
        return finished >= {name for name in TITLES if not without[name]}


def _by_key(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested config."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _by_key(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _pictures(folder: Path, stages: Iterable[str]) -> list[Picture]:
    """Each stage's latest figure of each kind, the last stage first."""
    pictures: dict[str, Picture] = {}  # by content: stages share what does not depend on models
    for stage in reversed([*stages]):
        for title, path in _latest(folder / stage / "figures"):
            try:
                uri, size = _jpeg(path)
            except (OSError, ValueError, SyntaxError) as error:
                logger.warning("The picture '%s' is left out of the report: %s", path, error)
            else:
                pictures.setdefault(uri, Picture(f"{TITLES[stage]} · {title}", uri, size))
    return list(pictures.values())[:MOST_PICTURES]


def _latest(folder: Path) -> Iterator[tuple[str, Path]]:
    """(title, path) of the latest figure of each kind, in the gallery's order."""
    names = os.listdir(folder) if folder.is_dir() else []
    numbered = filter(None, map(_NUMBERED.fullmatch, names))
    latest = {m[1]: m for m in sorted(numbered, key=lambda m: int(m[2]))}
    for kind, title in FIGURES.items():
        if (match := latest.get(kind)) and (path := folder / match[0]).is_file():
            yield f"{title} after {int(match[2]):,} iterations", path


def _jpeg(path: Path) -> tuple[str, tuple[int, int]]:
    """A picture as a data URI, and its (width, height)."""
    with Image.open(path, formats=("PNG",)) as file:  # others may start programs
        picture = file.convert("RGB")
    picture.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    text = base64.b64encode(content.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{text}", picture.size
