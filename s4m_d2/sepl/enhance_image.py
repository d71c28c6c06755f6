"""One image of ``sepl enhance``: its files in, the enhanced label map and a record of it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sepl.enhancement import merge_masks, select_masks
from s4m_d2.sepl.labels import read_label, write_label
from s4m_d2.sepl.mask_sources import (
    MaskFolder,
    Masks,
    MissingPartner,
    SamMasks,
    check_image_size,
)

OUTPUT_SUFFIX = ".png"


@dataclass(frozen=True)
class ImageFiles:
    """The files of the image ``name``; None: there is none, or it is not asked for."""

    name: str
    label: Path | None
    image: Path | None


@dataclass(frozen=True)
class Outcome:
    """What became of an image.

    Attributes:
        name: of the image.
        record: facts for the report, of which JSON can be made; None where nothing was written.
        problem: why nothing was written.
        is_missing: whether the reason is that a file is not there.
    """

    name: str
    record: dict[str, Any] | None = None
    problem: str = ""
    is_missing: bool = False


@dataclass(frozen=True)
class Enhancer:
    """Enhances images file by file; goes to other processes as it is.

    Attributes:
        output: folder of the enhanced label maps.
        source: of the masks.
        num_classes: with background.
        o_s_thresh, o_p_thresh, keep_uncovered: of :func:`~s4m_d2.sepl.enhance`.
        needs_image: whether an image must be there, be it only for its size.
        background_score: of labels that are CAM scores.
    """

    output: Path
    source: MaskFolder | SamMasks
    num_classes: int
    o_s_thresh: float
    o_p_thresh: float
    keep_uncovered: bool
    needs_image: bool
    background_score: float

    def path(self, name: str) -> Path:
        """Where the result of an image belongs."""
        return self.output / f"{name}{OUTPUT_SUFFIX}"

    def enhance(self, files: ImageFiles, masks: Masks | None = None) -> Outcome:
        """Write the enhanced label map of an image.

        Args:
            masks: those that :meth:`make_masks` returned; None: made or read here.

        Raises:
            S4MError: for reasons that concern other images too; the image's own are the outcome's.
        """
        try:
            file = self._label_file(files)
            label = self._read(file)
            if masks is None:
                masks = self._masks(files, file, label.shape)
            record, enhanced = self._enhanced(label, masks)
        except (DatasetError, InputError) as error:
            return _problem(files, error)
        write_label(self.path(files.name), enhanced)
        return Outcome(files.name, record)

    def make_masks(self, files: ImageFiles) -> Masks | Outcome:
        """The masks alone, for a process that owns a GPU; an outcome where that fails.

        Raises:
            S4MError: as :meth:`enhance`.
        """
        try:
            file = self._label_file(files)
            return self._masks(files, file, self._read(file).shape)
        except (DatasetError, InputError) as error:
            return _problem(files, error)

    def settings(self) -> dict[str, Any]:
        """What the results depend on, beside the labels themselves."""
        return {
            "o_s_thresh": self.o_s_thresh,
            "o_p_thresh": self.o_p_thresh,
            "keep_uncovered": self.keep_uncovered,
            "num_classes": self.num_classes,
            "background_score": self.background_score,
            **self.source.settings(),
        }

    def _read(self, file: Path) -> np.ndarray:
        return read_label(file, self.num_classes, self.background_score)

    def _label_file(self, files: ImageFiles) -> Path:
        """The label map, where all that is needed is there."""
        if files.label is None:
            raise MissingPartner("there is no pseudo-label of it")
        if files.image is None and self.needs_image:
            raise MissingPartner("there is no image of it")
        return files.label

    def _masks(self, files: ImageFiles, label: Path, size: tuple[int, int]) -> Masks:
        if files.image is not None:
            check_image_size(files.image, label, size)
        return self.source.masks(files.name, files.image, size)

    def _enhanced(self, label: np.ndarray, masks: Masks) -> tuple[dict[str, Any], np.ndarray]:
        selection = select_masks(
            label, masks, o_s_thresh=self.o_s_thresh, o_p_thresh=self.o_p_thresh
        )
        enhanced = merge_masks(label, masks, selection, keep_uncovered=self.keep_uncovered)
        record = {
            "size": list(label.shape),
            "masks": len(masks),
            "selected": int(np.count_nonzero(selection.selected)),
            "classes": selection.classes.tolist(),
            "classes_without_mask": selection.unmatched_classes.tolist(),
            "changed_pixels": int(np.count_nonzero(enhanced != label)),
        }
        return record, enhanced


def _problem(files: ImageFiles, error: Exception) -> Outcome:
    return Outcome(files.name, None, str(error), isinstance(error, MissingPartner))
