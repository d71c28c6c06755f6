"""Pictures of images, their label maps and SAM's masks side by side, one row per image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from s4m_d2.data.images import read_image
from s4m_d2.sepl.evaluate import confusions, miou
from s4m_d2.sepl.files import AFTER, BEFORE, IMAGE, TRUTH, ImageFiles, palette
from s4m_d2.sepl.masks import read_masks
from s4m_d2.sepl.rule import BACKGROUND, VOID
from s4m_d2.structures import RLEMasks
from s4m_d2.visualization import overlay, panel_grid

MASKS = "SAM's masks"
# Kind of the pictures and title of each column, in their order.
COLUMNS = {IMAGE: IMAGE, BEFORE: "CAM pseudo-label", MASKS: MASKS, AFTER: "SEPL", TRUTH: TRUTH}
LONG_SIDE = 640  # px, of a drawn picture
WHITE_SHARE = 0.6  # share of white in an image under labels and masks, as VOC's colors are dark
FILL_ALPHA = 0.75


class Row(NamedTuple):
    """Title with name and mIoUs, kind → (h, w, 3) uint8 picture, label maps."""

    title: str
    pictures: dict[str, np.ndarray]
    labels: list[np.ndarray]


def read_row(name: str, files: ImageFiles, masks: Path | None) -> Row:
    """Read and draw one image, and SAM's masks if their folder is given.

    DatasetError: a file is missing, damaged or of another size.
    """
    labels = files.read_labels(name)
    pixels = read_image(str(files.by_kind[IMAGE][name]), "RGB")
    pictures = {IMAGE: draw_image(pixels)}
    pictures |= {kind: draw_label(pixels, label) for kind, label in labels.items()}
    if masks is not None:
        rles = read_masks(masks, name, (pixels.shape[0], pixels.shape[1]))
        pictures[MASKS] = draw_masks(pixels, rles)
    title = name
    if TRUTH in labels:
        counts = confusions(labels, len(files.class_names))
        before, after = (100 * miou(of) for of in counts)
        title += f"    mIoU {before:.1f} → {after:.1f} ({after - before:+.1f})"
    return Row(title, pictures, list(labels.values()))


def write_picture(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write a PNG of all rows and a legend; columns without pictures are omitted."""
    panel_grid(
        [[row.pictures.get(kind) for kind in COLUMNS] for row in rows],
        list(COLUMNS.values()),
        path,
        row_titles=[row.title for row in rows],
        legend=legend_entries([label for row in rows for label in row.labels], names),
    )


def draw_image(image: np.ndarray) -> np.ndarray:
    """Resize an (H, W, 3) uint8 image to the longer side ``LONG_SIDE``."""
    height, width = image.shape[:2]
    scale = LONG_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=how)


def draw_label(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Draw an (H, W) uint8 label map in VOC's colors over the image, which is gray and faded.

    image: (H, W, 3) uint8, RGB. Returns (h, w, 3) uint8, the longer side ``LONG_SIDE``.
    """
    drawn = _faded(draw_image(image))
    label = cv2.resize(label, drawn.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    filled = cv2.addWeighted(drawn, 1 - FILL_ALPHA, palette()[label], FILL_ALPHA, 0)
    return np.where(label[..., None] == BACKGROUND, drawn, filled)


def draw_masks(image: np.ndarray, masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """:func:`draw_label` of COCO RLEs: touching masks in different colors, smaller over larger."""
    encoded = RLEMasks(masks, (image.shape[0], image.shape[1]))
    return draw_image(overlay(_faded(image), encoded, [0] * len(masks), [""]))


def legend_entries(
    labels: Iterable[np.ndarray], names: Sequence[str]
) -> list[tuple[str, np.ndarray]]:
    """Name and (1, 1, 3) uint8 swatch of each class in the label maps; void is the last."""
    present = set().union(*(np.unique(label).tolist() for label in labels)) - {BACKGROUND}
    return [
        ("void" if i == VOID else names[i], palette()[None, i : i + 1]) for i in sorted(present)
    ]


def _faded(image: np.ndarray) -> np.ndarray:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    faded = np.rint(gray * (1 - WHITE_SHARE) + 255 * WHITE_SHARE).astype(np.uint8)
    return np.repeat(faded[..., None], 3, axis=2)
