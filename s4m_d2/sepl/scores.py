"""How well class-index maps agree with the ground truth: IoU by class, mIoU, pixel accuracy.

As in VOC's benchmark, pixels of the whole data set are counted before anything is divided, and
background is a class. (The mean of the images' mIoUs is another number, in which a pixel of a small
image weighs more than one of a large image.)

Void (255) in the ground truth is not scored. Void in a label is an answer withheld: the pixel
counts as missed for its true class and as a false positive for none. Were it not scored at all,
labels would gain from void where they are wrong; were it background, they would lose twice.
"""

from __future__ import annotations

import math

import numpy as np

from s4m_d2.errors import InputError
from s4m_d2.sepl.enhancement import VOID

VALUES = 256  # of a uint8 map


class ConfusionMatrix:
    """Pixels by true class and label, accumulated over any number of images.

    Attributes:
        counts: (C, C + 1) int64; rows are true classes, columns are labels, the last one void.

    Example:
        >>> truth, label = np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]])
        >>> confusion = ConfusionMatrix(num_classes=3)
        >>> confusion.update(truth, label)
        >>> confusion.iou()
        array([0.5, 0.5, nan])
        >>> confusion.miou()
        0.5
    """

    def __init__(self, num_classes: int):
        """
        Args:
            num_classes: C, with background; class indices are 0..C-1.

        Raises:
            InputError: C is not in 1..255.
        """
        if not 1 <= num_classes <= VOID:
            raise InputError(f"num_classes is {num_classes}; expected 1..{VOID} with background")
        self.counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    def update(self, truth: np.ndarray, label: np.ndarray) -> None:
        """Count one image.

        Args:
            truth: (H, W) integers, the ground truth; 255 is not scored.
            label: (H, W) integers, the label under test; 255 is wrong wherever the truth is not
                255.

        Raises:
            InputError: shapes disagree, or a value is neither a class index nor 255. Nothing is
                counted then.
        """
        _check_map("truth", truth)
        _check_map("label", label)
        if truth.shape != label.shape:
            raise InputError(
                f"the ground truth has the size {truth.shape} (H, W) and the label {label.shape}; "
                "they must be maps of the same image, none of them resized"
            )
        pairs = truth.astype(np.uint16) * np.uint16(VALUES) + label.astype(np.uint16)
        counts = np.bincount(pairs.ravel(), minlength=VALUES * VALUES).reshape(VALUES, VALUES)
        for name, pixels in (("ground truth", counts.sum(1)), ("label", counts.sum(0))):
            unknown = np.flatnonzero(pixels[self.num_classes : VOID]) + self.num_classes
            if len(unknown):
                raise InputError(
                    f"the {name} has class indices {unknown.tolist()}, but there are "
                    f"{self.num_classes} classes, 0..{self.num_classes - 1} with background. Give "
                    f"the number of classes of the data set, and {VOID} where a class is unknown."
                )
        labels = np.r_[: self.num_classes, VOID]
        self.counts += counts[: self.num_classes, labels]

    def iou(self) -> np.ndarray:
        """(C,) float64 in [0, 1]; nan where neither truth nor labels have the class."""
        hits = self.counts.diagonal()
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)

    def miou(self) -> float:
        """Mean IoU of the classes that occur, background among them; nan where none does."""
        iou = self.iou()
        present = ~np.isnan(iou)
        return float(iou[present].mean()) if present.any() else math.nan

    def pixel_accuracy(self) -> float:
        """Share of scored pixels whose label is right; nan without such pixels."""
        pixels = int(self.counts.sum())
        return int(np.trace(self.counts)) / pixels if pixels else math.nan

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of other images (of another process, say)."""
        if other.num_classes != self.num_classes:
            raise InputError(
                f"confusion matrices of {self.num_classes} and {other.num_classes} classes cannot "
                "be added; score all images with the same classes"
            )
        self.counts += other.counts


def confusion(truth: np.ndarray, label: np.ndarray, num_classes: int) -> ConfusionMatrix:
    """The matrix of one image; its ``miou()`` is over the classes of its truth and its label.

    Arguments and errors are those of :class:`ConfusionMatrix` and its ``update``.
    """
    matrix = ConfusionMatrix(num_classes)
    matrix.update(truth, label)
    return matrix


def _check_map(name: str, values: np.ndarray) -> None:
    shape = getattr(values, "shape", None)
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "iu":
        raise InputError(
            f"{name} must be an (H, W) array of integers, got {type(values).__name__} of shape "
            f"{shape} and dtype {getattr(values, 'dtype', None)}"
        )
    if values.size and (values.min() < 0 or values.max() > VOID):
        raise InputError(
            f"{name} has values from {values.min()} to {values.max()}; expected class indices and "
            f"{VOID} for void"
        )
