"""One image of ``s4m-sepl visualize``: its labels, masks and scores, read and drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from s4m_d2.data.images import read_image
from s4m_d2.errors import DatasetError
from s4m_d2.sepl.comparison import AFTER, TRUTH, ImageScore, LabelFolders, score_image
from s4m_d2.sepl.drawing import draw_image, draw_label, draw_masks
from s4m_d2.sepl.mask_files import find_masks, read_masks

# Kinds of pictures, beside those of label maps.
IMAGE, MASKS = "image", "SAM's masks"


@dataclass(frozen=True)
class Row:
    """An image of the picture.

    Attributes:
        title: name and scores.
        pictures: kind → (h, w, 3) uint8.
        labels: label maps, (H, W) uint8.
        problem: why masks are missing; None: they are not, or nobody asked for them.
    """

    title: str
    pictures: dict[str, np.ndarray]
    labels: list[np.ndarray]
    problem: str | None


@dataclass(frozen=True)
class Inputs:
    """Where the pictures' contents come from.

    Attributes:
        folders: of label maps, the ground truth among them or not.
        images: by stem.
        masks: folder of SAM's masks, which may be missing unless ``needs_masks``.
    """

    folders: LabelFolders
    images: Mapping[str, Path]
    masks: Path
    needs_masks: bool

    @property
    def has_truth(self) -> bool:
        return TRUTH in self.folders.files

    def names(self) -> list[str]:
        """Images that have all that is needed.

        Raises:
            DatasetError: there are none.
        """
        names = [name for name in self.folders.common_names() if name in self.images]
        if not names:
            kinds = ", ".join((IMAGE, *self.folders.files))
            raise DatasetError(
                f"no image has a file of each kind ({kinds}); files belong together by their "
                "names without suffix. Give folders of the same images."
            )
        return names

    def row(self, name: str, score: ImageScore | None) -> Row:
        """Read and draw one image.

        Args:
            name: stem.
            score: for the title, where there is no ground truth to score the labels with.

        Raises:
            DatasetError: something is missing, damaged or of another size; but not masks.
        """
        if name not in self.images:
            raise DatasetError(f"no {IMAGE} of this name")
        labels = self.folders.read(name)
        image = read_image(str(self.images[name]), "RGB")
        size = image.shape[:2]
        if size != labels[AFTER].shape:
            raise DatasetError(
                f"{self.images[name]} has the size {size} (H, W), but its labels have "
                f"{labels[AFTER].shape}. Give the image that the labels were made for."
            )
        if self.has_truth:
            score = score_image(name, labels, self.folders.num_classes).images[0]
        pictures = {IMAGE: draw_image(image)}
        pictures |= {kind: draw_label(image, label) for kind, label in labels.items()}
        problem = None
        try:
            masks = self._masks(name, size)
            if masks is not None:
                pictures[MASKS] = draw_masks(image, masks)
        except DatasetError as error:
            problem = f"drawn without masks: {error}"
        return Row(_title(name, score), pictures, list(labels.values()), problem)

    def _masks(self, name: str, size: tuple[int, int]) -> list[dict] | None:
        source = find_masks(self.masks, name)
        if source is None and self.needs_masks:
            raise DatasetError(f"'{self.masks}' has none")
        return None if source is None else read_masks(source, size)


def _title(name: str, score: ImageScore | None) -> str:
    if score is None:
        return name
    if score.before is None or math.isnan(score.gain):
        return f"{name}    nothing to score"
    before, after, gain = (100 * value for value in (score.before, score.after, score.gain))
    return f"{name}    mIoU {before:.1f} → {after:.1f} ({gain:+.1f})"
