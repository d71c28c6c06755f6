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

    def enhance(self, files: ImageFiles) -> Outcome:
        """Write the enhanced label map of an image.

        Raises:
            S4MError: for reasons that concern other images too; the image's own are the outcome's.
        """
        try:
            record, enhanced = self._enhanced(*self._inputs(files))
        except (DatasetError, InputError) as error:
            return Outcome(files.name, None, str(error), isinstance(error, MissingPartner))
        write_label(self.output / f"{files.name}{OUTPUT_SUFFIX}", enhanced)
        return Outcome(files.name, record)

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

    def _inputs(self, files: ImageFiles) -> tuple[np.ndarray, Masks]:
        if files.label is None:
            raise MissingPartner("there is no pseudo-label of it")
        if files.image is None and self.needs_image:
            raise MissingPartner("there is no image of it")
        label = read_label(files.label, self.num_classes, self.background_score)
        if files.image is not None:
            check_image_size(files.image, files.label, label.shape)
        return label, self.source.masks(files.name, files.image, label.shape)

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
