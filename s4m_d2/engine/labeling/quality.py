"""Measurement of pseudo-labels against true labels: images, measurement, hook."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from s4m_d2.data import TrueLabelsMapper
from s4m_d2.data.splits import has_true_labels, true_records
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.rng import sample_seeds, undisturbed_generators
from s4m_d2.engine.stages import runs_stage
from s4m_d2.engine.training.build import labeled_names
from s4m_d2.engine.training.step import PRECISIONS
from s4m_d2.errors import ConfigError, DatasetError, Finding, S4MError
from s4m_d2.evaluation import PseudoLabelQuality
from s4m_d2.files import remove_lines
from s4m_d2.report.run import MEASURES
from s4m_d2.semi.refinement import Refinement, TeacherMasks
from s4m_d2.tiling import build_tiling

logger = logging.getLogger(__name__)

BEFORE, AFTER = "before", "after"  # refinement
RECORDS = "pseudo_label_quality.jsonl"  # in the stage's folder
_STREAM = "pseudo-label quality"  # of the prompt points' draws


@dataclass(frozen=True)
class QualityReport:
    """Quality of the teacher's masks ("before" refinement) and, with refinement, of the refined
    masks ("after"), and the number of unreadable images."""

    steps: dict[str, PseudoLabelQuality]
    skipped: int

    def as_dict(self) -> dict[str, Any]:
        steps = {step: quality.as_dict() for step, quality in self.steps.items()}
        return {"images": self.steps[BEFORE].images, "skipped": self.skipped, **steps}


class QualityMeasurement:
    """Labels images as in training, and compares the pseudo-labels with the true labels.

    The teacher gets each image resized as in a test, instead of a random view. Selection,
    refinement, thresholds and filters (also of unrefined masks) are training's; ARP and the strong
    view are not used. An image's prompt points are always the same, for any number of processes.

    Args:
        cfg: config of stage 2.
        records: labeled images (tiles are used if enabled); None: those of S4M.QUALITY.
    """

    def __init__(
        self, cfg: CfgNode, pseudo_labeling: PseudoLabeling, records: Sequence[dict] | None = None
    ) -> None:
        names = quality_datasets(cfg) if records is None else labeled_names(cfg)
        records = quality_records(cfg) if records is None else records
        self.pseudo_labeling = pseudo_labeling
        self.records = list(build_tiling(cfg).records(records))
        self.mapper: Callable[[dict], dict[str, Any]] = TrueLabelsMapper(cfg)
        self.class_names = quality_class_names(cfg, names)
        self.seed = cfg.SEED
        self.precision = PRECISIONS[cfg.S4M.AMP_PRECISION] if cfg.SOLVER.AMP.ENABLED else None
        self._warned: set[str] = set()

    @torch.no_grad()
    def __call__(
        self, progress: Callable[[Iterable[int]], Iterable[int]] = iter
    ) -> QualityReport | None:
        """Measure, in all processes together; random states are restored.

        Unreadable images are left out, with one warning each. ``progress`` wraps the indices of
        this process' images. Returns the main process' report of all images, None in others.
        """
        refines = not isinstance(self.pseudo_labeling.refiner, TeacherMasks)
        names = (BEFORE, AFTER) if refines else (BEFORE,)
        steps = {name: PseudoLabelQuality(self.class_names) for name in names}
        places = range(comm.get_rank(), len(self.records), comm.get_world_size())
        with undisturbed_generators():
            skipped = sum(not self._measure(place, steps) for place in progress(places))
        processes = comm.gather((steps, skipped))
        if not comm.is_main_process():
            return None
        for others, of_other in processes[1:]:
            skipped += of_other
            for step, quality in steps.items():
                quality.merge(others[step])
        return QualityReport(steps, skipped)

    def _measure(self, place: int, steps: dict[str, PseudoLabelQuality]) -> bool:
        """Add one image at the model's input size; False: unreadable."""
        name = self.records[place]["file_name"]
        try:
            sample = self.mapper(self.records[place])
        except DatasetError as error:
            if name not in self._warned:
                logger.warning("Left out in the measurement of pseudo-labels: %s", error)
            self._warned.add(name)
            return False
        sample["seeds"] = sample_seeds(self.seed, _STREAM, place)
        labeling, truth = self.pseudo_labeling, sample["truth"]
        device = next(labeling.teacher.model.parameters()).device.type
        with torch.autocast(device, self.precision, enabled=self.precision is not None):
            [selection], refinement = labeling.label([sample])
        masks = selection.masks_at(truth.image_size)
        unrefined = Refinement([selection.labels.with_masks(masks)])
        before = labeling.judge([selection], unrefined)
        labels = {BEFORE: before.labels[0], AFTER: refinement.labels[0]}
        area = sample["height"] * sample["width"] / math.prod(truth.image_size)
        truths = truth.gt_classes, truth.gt_masks.tensor, truth.gt_crowds
        for step, quality in steps.items():
            quality.add(labels[step], *truths, pixel_area=area)
        return True


class PseudoLabelQualityHook(HookBase):
    """Measures the pseudo-labels every ``period`` iterations, beside the training.

    Logs ``pseudo_label_quality/before/...`` and ``.../after/...`` and adds a line of JSON, with
    tables by class and by size, to the file ``path``. A continued run replaces the lines that it
    repeats. ``context`` makes the context of a measurement, which a signal may end.
    """

    def __init__(
        self,
        measurement: QualityMeasurement,
        period: int,
        path: str,
        context: Callable[[], AbstractContextManager],
    ) -> None:
        self.measurement, self.period = measurement, period
        self.path, self.context = path, context

    def before_train(self) -> None:
        if comm.is_main_process():  # the iteration of the checkpoint is measured again
            remove_lines(self.path, self.trainer.start_iter - 1)

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        with self.context():
            report = self.measurement()
        if report is None:
            return
        scalars = {
            f"pseudo_label_quality/{step}/{name}": value
            for step, quality in report.steps.items()
            for name, value in quality.overall().items()
            if name in MEASURES and value is not None
        }
        get_event_storage().put_scalars(**scalars, smoothing_hint=False)
        line = json.dumps({"iteration": self.trainer.iter, **report.as_dict()})
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # which must not end the training
            logger.warning("A line of '%s' is not written: %s", self.path, error)


def quality_datasets(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the data sets to measure on; DatasetError: there is none."""
    unlabeled = cfg.DATASETS.UNLABELED
    names = tuple(cfg.S4M.QUALITY.DATASETS or filter(has_true_labels, unlabeled))
    if not names:
        raise DatasetError(
            f"Of DATASETS.UNLABELED ({', '.join(unlabeled) or 'empty'}) no labels are known to "
            "compare with. Name a labeled data set in S4M.QUALITY.DATASETS."
        )
    return names


def quality_records(cfg: CfgNode) -> list[dict]:
    """The images to measure on, none of them of DATASETS.TRAIN; DatasetError: there are none."""
    trained_on = {record["file_name"] for record in true_records(labeled_names(cfg))}
    return true_records(quality_datasets(cfg), cfg.S4M.QUALITY.MAX_IMAGES, trained_on)


def quality_class_names(cfg: CfgNode, datasets: Sequence[str]) -> list[str]:
    """Names of the model's classes, as these data sets have them, or their numbers; ConfigError: a
    data set has another number of classes."""
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    names = [str(index) for index in range(count)]
    for dataset in reversed(datasets):
        found = MetadataCatalog.get(dataset).get("thing_classes", names)
        if len(found) != count:
            raise ConfigError(
                f"S4M.QUALITY: '{dataset}' has {len(found)} classes; expected {count}, "
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES. Name others in S4M.QUALITY.DATASETS."
            )
        names = list(found)
    return names


def quality_findings(cfg: CfgNode) -> list[Finding]:
    """A line of the report before training, if pseudo-labels are to be measured."""
    period = cfg.S4M.QUALITY.PERIOD
    if period < 1 or not runs_stage(cfg, "student"):
        return []
    item = "label quality"
    try:
        names, images = quality_datasets(cfg), len(quality_records(cfg))
        quality_class_names(cfg, names)
    except S4MError as error:
        text = f"{error} S4M.QUALITY.PERIOD 0 trains without measuring."
        return [Finding(item, "cannot be measured", (type(error)(text),))]
    return [Finding(item, f"{images:,} images of {', '.join(names)}, every {period:,} iterations")]
