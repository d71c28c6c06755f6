"""A run as its page shows it, read from the files in its output folder.

metrics.json has a JSON object per line, each with an "iteration"; its last line may be truncated.
"""

import base64
import datetime
import functools
import io
import itertools
import json
import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from s4m_d2.errors import DatasetError
from s4m_d2.files import write_json

logger = logging.getLogger(__name__)

FACTS, CONFIG = "run.json", "config.yaml"  # in OUTPUT_DIR
# Measurements and decisions with a line "text": name on the page, file in OUTPUT_DIR.
MEASURED = {
    "SAM's adaptation": "sam_adapted.json",
    "SAM's masks": "teacher/sam_quality.json",
    "SAM's masks, stage 2": "student/sam_quality.json",
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
# Titles of figures, in the order of the gallery.
FIGURES = {
    "pseudo_labels": "pseudo-labels, and the way to them",
    "predictions": "predictions",
    "arp": "ARP",
    "similarity": "similarity to a point",
    "views": "views of unlabeled images",
    "labeled": "labeled images and augmentation",
}
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
LABELED, UNLABELED = "labeled", "unlabeled"
MEASURES = ("class_accuracy", "sq", "precision", "recall", "pq")  # of pseudo-label quality
_KEPT = re.compile(
    r"total_loss|lr|time|data_time|(pseudo_labels|refinement|data|train)/.+|(.+/)?segm/AP"
    rf"|pseudo_label_quality/(before|after)/({'|'.join(MEASURES)})"
)


def finite(value: object) -> float | None:
    """Convert to float; None: not a number, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


class Curve(NamedTuple):
    """Points by iteration, each of one record or of several consecutive ones; P points."""

    iterations: np.ndarray  #: (P,) the middle of the point's records
    low: np.ndarray  #: (P,) least of the point's finite values; without any there is no point
    mean: np.ndarray  #: (P,) of them
    high: np.ndarray  #: (P,) greatest of them
    last: float = math.nan  #: value of the last record


_NONE = np.zeros(0)
EMPTY = Curve(_NONE, _NONE, _NONE, _NONE)


class Curves(dict[str, Curve]):
    """All curves of a file, by names of :func:`curve_names`; one without values is empty."""

    iterations = 0  #: up to the last record

    def __missing__(self, name: str) -> Curve:
        return EMPTY

    def mean(self, name: str) -> float:
        """Mean of a curve's points; NaN if there are none."""
        values = self[name].mean
        return float(values.mean()) if len(values) else math.nan


@functools.lru_cache(1 << 14)
def curve_names(key: str) -> tuple[str, ...]:
    """Names of the curves to which a value of metrics.json is added; (): of none.

    Losses are summed over layers, as "labeled:loss_ce" and "unlabeled:loss_ce", and over all kinds,
    as "labeled" and "unlabeled".
    """
    name = key.removeprefix("unsup/")
    if name.startswith("loss"):
        part = LABELED if name == key else UNLABELED
        kind = re.sub(r"_\d+$", "", name)  # without the layer
        return part, f"{part}:{kind}"
    return (key,) if _KEPT.fullmatch(key) else ()


def read_curves(path: str | os.PathLike[str], most: int = 240) -> Curves:
    """The curves of a metrics.json, which may be missing, empty, torn, or being written.

    A curve has at most ``most`` points, which records of neighboring iterations share.
    """
    curves, records = Curves(), 0
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in Path(path).read_bytes().splitlines() if os.path.exists(path) else ():
        try:
            record = json.loads(line)
            iteration = int(record["iteration"])
        except (ValueError, LookupError, TypeError):
            continue
        values: dict[str, float] = {}
        for key, value in record.items():
            for name in curve_names(key):
                known = finite(value)
                values[name] = values.get(name, 0.0) + (math.nan if known is None else known)
        for name, value in values.items():
            found[name].append((iteration, value))
        records += 1
        curves.iterations = max(curves.iterations, iteration + 1)
    width = 1 if records <= most else -(-curves.iterations // most)
    curves.update((name, _thinned(np.array(pairs), width)) for name, pairs in found.items())
    return curves


def _thinned(pairs: np.ndarray, width: int) -> Curve:
    """The curve of (iteration, value) pairs, whose points cover ``width`` iterations each."""
    last = pairs[-1, 1]
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    pairs = pairs[np.isfinite(pairs[:, 1])]
    starts = np.flatnonzero(np.diff(pairs[:, 0] // width, prepend=-1))
    if not len(starts):
        return EMPTY
    iterations, values = pairs.T
    ends = np.append(starts[1:], len(pairs))
    low, high = (of.reduceat(values, starts) for of in (np.minimum, np.maximum))
    mean = np.add.reduceat(values, starts) / (ends - starts)
    return Curve((iterations[starts] + iterations[ends - 1]) / 2, low, mean, high, float(last))


def write_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write nested results as JSON; numbers that are not finite become null."""
    finite_only = json.loads(json.dumps(results, default=float), parse_constant=lambda _: None)
    write_json(path, finite_only, indent=2)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file of :func:`write_results`."""
    with open(path) as file:
        return json.load(file)


def stored_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read such a file; {}: it is missing or damaged."""
    try:
        return dict(read_results(path))
    except (OSError, TypeError, ValueError):
        return {}


class Stage:
    """One of the trainings of a run, read from its folder, named by a key of TITLES.

    ``is_fixed``: a later one has begun.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, is_fixed: bool) -> None:
        def iterations(key: str) -> int:
            value = settings.get(key)
            return value if isinstance(value, int) else 0

        self.name, self.title, self.model = folder.name, TITLES[folder.name], MODELS[folder.name]
        self.curves = read_curves(folder / "metrics.json")
        self.results = stored_results(folder / "results.json")  # nested as by Detectron2
        evaluated = self.results.get("iterations", 0)
        own = 0 if self.name == "student" else iterations(f"S4M.{self.name.upper()}.MAX_ITER")
        length = own or iterations("SOLVER.MAX_ITER")  # 0: unknown
        is_trained = (folder / "model_final.pth").is_file()
        self.finished = is_trained and (is_fixed or evaluated >= length)
        self.iterations = (evaluated if self.finished else 0) or length
        self.burn_in = iterations("S4M.BURN_IN") if self.name == "student" else 0
        self.done = (self.finished and self.iterations) or self.curves.iterations

    @property
    def progress(self) -> str:
        whole = f" of {self.iterations:,}" if self.iterations else ""
        return f"{self.done:,}{whole} iterations{', finished' if self.finished else ''}"

    def models(self) -> Iterator[tuple[str, Mapping[str, float | None]]]:
        """Name and mask AP of each evaluated model, for each data set if there are several."""
        for path, values in nested_items(self.results):
            if path[-1] == MASKS and isinstance(values, Mapping):
                yield self.model_name(path[:-1]), values

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

    ``problem``: why the run ended early; "": it did not. DatasetError: the folder has no run.
    """

    def __init__(self, output_dir: str, problem: str = "") -> None:
        folder = Path(output_dir)
        self.name, self.problem = os.path.basename(os.path.abspath(output_dir)), problem
        self.config = ""  # the file's text
        self.settings: dict[str, Any] = {}  # by dotted key
        with suppress(Exception):  # PyYAML raises many kinds
            self.config = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
            found = nested_items(yaml.safe_load(self.config))
            self.settings = {".".join(path): value for path, value in found}
        present = [name for name in TITLES if (folder / name).is_dir()]
        if not self.config and not present:
            expected = f"{CONFIG} or one of {', '.join(TITLES)}/"
            raise DatasetError(f"'{output_dir}' holds no run: expected {expected} in OUTPUT_DIR.")
        self.stages = [
            Stage(folder / name, self.settings, is_fixed=name != present[-1]) for name in present
        ]
        self.facts = stored_results(folder / FACTS)  # findings of checks, measurements, versions
        for name, file in MEASURED.items():
            if text := stored_results(folder / file).get("text"):
                self.facts[name] = text
        self.pictures = _pictures(folder, present)
        self.written = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")

    def shown_settings(self) -> list[tuple[str, str]]:
        """(key, text) of the settings to show."""
        found = [(key, self.settings.get(key)) for key in SHOWN]
        return [
            (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
            for key, value in found
            if value not in (None, "", [])
        ]

    @property
    def complete(self) -> bool:
        """Whether every stage that the config asks for is trained to its end."""
        stage, weights = self.settings.get("S4M.STAGE"), self.settings.get("S4M.TEACHER_WEIGHTS")
        without = {"teacher": stage == "student" or weights, "student": stage == "teacher"}
        without["finetune"] = stage == "teacher" or not self.settings.get("S4M.FINETUNE.MAX_ITER")
        finished = {stage.name for stage in self.stages if stage.finished}
        return finished >= {name for name in TITLES if not without[name]}


def nested_items(node: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of everything in nested mappings, these too."""
    for key, value in node.items():
        yield (*path, str(key)), value
        if isinstance(value, Mapping):
            yield from nested_items(value, *path, str(key))


def _pictures(folder: Path, stages: Sequence[str]) -> list[Picture]:
    """Each stage's latest figure of each kind, the last stage first."""
    pictures: dict[str, Picture] = {}  # by content: stages share what does not depend on models
    for stage, (kind, title) in itertools.product(reversed(stages), FIGURES.items()):
        paths = (folder / stage / "figures").glob(f"{kind}_*.png")
        found = {int(m[1]): p for p in paths if (m := re.fullmatch(rf"{kind}_(\d+)", p.stem))}
        if not found:
            continue
        last = max(found)
        try:
            about = f"{TITLES[stage]} · {title} after {last:,} iterations"
            picture = _picture(about, found[last])
            pictures.setdefault(picture.uri, picture)
        except (OSError, ValueError, SyntaxError) as error:
            logger.warning("The picture '%s' is left out of the report: %s", found[last], error)
    return list(pictures.values())[:MOST_PICTURES]


def _picture(title: str, path: Path) -> Picture:
    with Image.open(path, formats=("PNG",)) as file:  # others may start programs
        picture = file.convert("RGB")
    picture.thumbnail((1600, 1600), Image.Resampling.LANCZOS)  # px
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=85, optimize=True)
    text = base64.b64encode(content.getvalue()).decode("ascii")
    return Picture(title, f"data:image/jpeg;base64,{text}", picture.size)
