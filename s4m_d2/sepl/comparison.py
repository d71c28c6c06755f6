"""Folders of label maps against the ground truth, image by image and as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from s4m_d2.errors import DatasetError, S4MError
from s4m_d2.sepl.cam_scores import BACKGROUND_SCORE
from s4m_d2.sepl.labels import read_label
from s4m_d2.sepl.listing import label_files
from s4m_d2.sepl.scores import ConfusionMatrix, confusion

CHUNK_IMAGES = 64  # scored by a thread at a time

TRUTH, BEFORE, AFTER = "ground truth", "pseudo-label", "enhanced label"  # kinds of label maps


class LabelFolders:
    """Label maps of the same images in several folders; files of one name belong together.

    Attributes:
        files: kind (``TRUTH``, ...) → name → path.
        num_classes: with background.
    """

    def __init__(
        self,
        folders: Mapping[str, Path | None],
        num_classes: int,
        suffix: str = "",
        background_score: float = BACKGROUND_SCORE,
    ):
        """
        Args:
            folders: kind → folder of label maps; None: there is none of this kind.
            suffix: of the names of pseudo-labels, as that of ``label_files``.
            background_score: of CAM scores, as that of ``read_label``.

        Raises:
            DatasetError: a folder is missing or empty.
        """
        self._folders = {kind: path for kind, path in folders.items() if path is not None}
        self.files = {
            kind: label_files(path, suffix if kind == BEFORE else "")
            for kind, path in self._folders.items()
        }
        self.num_classes = num_classes
        self._background_score = background_score

    def label_names(self) -> list[str]:
        """Stems that any folder but the ground truth's has, sorted: that may be of more images."""
        labels = [files for kind, files in self.files.items() if kind != TRUTH]
        return sorted(set().union(*labels))

    def common_names(self) -> list[str]:
        """Stems that all folders have, sorted."""
        return sorted(set.intersection(*map(set, self.files.values())))

    def read(self, name: str) -> dict[str, np.ndarray]:
        """An image's label maps by kind, (H, W) uint8.

        Raises:
            DatasetError: one is missing, damaged, has other classes, or another size than the rest.
        """
        missing = [
            f"no {kind} in '{self._folders[kind]}'"
            for kind, files in self.files.items()
            if name not in files
        ]
        if missing:
            raise DatasetError(", ".join(missing))
        paths = {kind: files[name] for kind, files in self.files.items()}
        labels = {
            kind: read_label(path, self.num_classes, self._background_score)
            for kind, path in paths.items()
        }
        if len({label.shape for label in labels.values()}) > 1:
            sizes = ", ".join(f"{paths[kind]} {label.shape}" for kind, label in labels.items())
            raise DatasetError(
                f"the sizes (H, W) disagree: {sizes}. Make all of them at the image's size."
            )
        return labels


@dataclass(frozen=True)
class ImageScore:
    """mIoU of an image's label before and after, in [0, 1]; nan where nothing is to be scored.

    Attributes:
        before: None where only the enhanced label is scored.
    """

    name: str
    before: float | None
    after: float

    @property
    def gain(self) -> float:
        """nan where it is unknown."""
        return math.nan if self.before is None else self.after - self.before


@dataclass
class Comparison:
    """What became of the images: their scores, or what is wrong with them.

    Attributes:
        before: of the pseudo-labels; None where only the enhanced labels are scored.
        after: of the enhanced labels. Both count the same images: those of ``images``.
        images: by name.
        problems: name → message, of the images that could not be compared.
    """

    before: ConfusionMatrix | None
    after: ConfusionMatrix
    images: list[ImageScore] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Comparison) -> None:
        """Add other images."""
        if self.before is not None:
            assert other.before is not None  # of the same folders
            self.before.merge(other.before)
        self.after.merge(other.after)
        self.images += other.images
        self.problems |= other.problems


def compare(
    folders: LabelFolders, names: Iterable[str] | None = None, workers: int = 1
) -> Comparison:
    """Score the enhanced labels, and the pseudo-labels if there are any.

    Only an image with a readable file in every folder is compared; what is missing or wrong with
    another one is in ``problems``.

    Args:
        folders: with a ground truth.
        names: stems of the images; None: all that have a label, enhanced or not.
        workers: threads. The result does not depend on their number.
    """
    names = folders.label_names() if names is None else sorted(set(names))
    chunks = [names[start : start + CHUNK_IMAGES] for start in range(0, len(names), CHUNK_IMAGES)]
    total = _compare([], folders)
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(lambda chunk: _compare(chunk, folders), chunks):
            total.merge(part)
    return total


def _compare(names: Iterable[str], folders: LabelFolders) -> Comparison:
    before = ConfusionMatrix(folders.num_classes) if BEFORE in folders.files else None
    part = Comparison(before, ConfusionMatrix(folders.num_classes))
    for name in names:
        try:
            labels = folders.read(name)
        except S4MError as error:
            part.problems[name] = str(error)
            continue
        part.merge(score_image(name, labels, folders.num_classes))
    return part


def score_image(name: str, labels: Mapping[str, np.ndarray], num_classes: int) -> Comparison:
    """Compare one image's label maps, given by kind, all (H, W) integers."""
    before = confusion(labels[TRUTH], labels[BEFORE], num_classes) if BEFORE in labels else None
    after = confusion(labels[TRUTH], labels[AFTER], num_classes)
    score = ImageScore(name, None if before is None else before.miou(), after.miou())
    return Comparison(before, after, [score])
