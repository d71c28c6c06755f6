"""What is known of pseudo-labels once they are matched with true instances."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Quality:
    """Counts of some pseudo-labels and true instances, and the measures that follow from them.

    A measure is nan where it has nothing to measure. For one class, ``class_accuracy``, ``sq``,
    ``mask_recall`` and ``recall`` are of the true instances of the class; ``mask_precision`` and
    ``precision`` are of the pseudo-labels that claim to be of it.

    Attributes:
        instances: true ones, without crowds.
        found: of them, those that a pseudo-label matches.
        pseudo_labels: without those in crowds.
        matched: of them, those that match an instance.
        duplicates: of those without a match, those whose IoU with an instance exceeds 0.5 too:
            another pseudo-label matches it.
        correct: matches whose class is right.
        in_crowds: pseudo-labels that are not judged.
        iou_found: sum of the IoUs of the instances found.
        iou_correct: sum of the IoUs of matches whose class is right.
    """

    instances: float = 0.0
    found: float = 0.0
    pseudo_labels: float = 0.0
    matched: float = 0.0
    duplicates: float = 0.0
    correct: float = 0.0
    in_crowds: float = 0.0
    iou_found: float = 0.0
    iou_correct: float = 0.0

    @property
    def class_accuracy(self) -> float:
        """Share of the instances found whose class is right."""
        return _ratio(self.correct, self.found)

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matches."""
        return _ratio(self.iou_found, self.found)

    @property
    def precision(self) -> float:
        """Share of the pseudo-labels that match an instance and have its class."""
        return _ratio(self.correct, self.pseudo_labels)

    @property
    def recall(self) -> float:
        """Share of the instances that a pseudo-label of their class matches."""
        return _ratio(self.correct, self.instances)

    @property
    def mask_precision(self) -> float:
        """Share of the pseudo-labels that match an instance, of whatever class."""
        return _ratio(self.matched, self.pseudo_labels)

    @property
    def mask_recall(self) -> float:
        """Share of the instances that a pseudo-label matches, of whatever class."""
        return _ratio(self.found, self.instances)

    @property
    def rq(self) -> float:
        """Recognition quality: the harmonic mean of precision and recall."""
        return _ratio(self.correct, (self.pseudo_labels + self.instances) / 2)

    @property
    def pq(self) -> float:
        """Panoptic quality: ``rq`` times the mean IoU of matches whose class is right.

        Of several classes, their matches are taken together; the benchmark's is the classes' mean.
        """
        return _ratio(self.iou_correct, (self.pseudo_labels + self.instances) / 2)

    def as_dict(self) -> dict[str, float | int | None]:
        """Measures, then counts, for JSON: a measure of nothing is None."""
        measures = {name: getattr(self, name) for name in MEASURES}
        plain = {name: None if math.isnan(value) else value for name, value in measures.items()}
        counts = {name: int(v) for name, v in asdict(self).items() if not name.startswith("iou")}
        return plain | counts


#: Names of the counts and of the measures of :class:`Quality`.
COUNTS = tuple(field.name for field in fields(Quality))
MEASURES = (
    "class_accuracy",
    "sq",
    "precision",
    "recall",
    "mask_precision",
    "mask_recall",
    "rq",
    "pq",
)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
