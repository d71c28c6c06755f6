"""Scores and pictures of label maps: IoU by class, mIoU, pixel accuracy; columns side by side.

As in VOC's benchmark, pixels are counted over the whole data set before dividing, and background is
a class. Void (255) in the ground truth is ignored. Void in a label counts as a miss of the true
class and as no false positive: ignoring it would reward void on wrong pixels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from s4m_d2.data.images import read_image
from s4m_d2.errors import DatasetError
from s4m_d2.sepl.files import AFTER, BEFORE, IMAGE, TRUTH, ImageFiles, palette, read_masks
from s4m_d2.sepl.rule import BACKGROUND, VOID
from s4m_d2.structures import RLEMasks
from s4m_d2.visualization import overlay, panel_grid

MASKS = "SAM's masks"
# Kind of the pictures and title of each column, in their order.
COLUMNS = {IMAGE: IMAGE, BEFORE: "CAM pseudo-label", MASKS: MASKS, AFTER: "SEPL", TRUTH: TRUTH}
WHITE_SHARE = 0.6  # share of white in an image under labels and masks, as VOC's colors are dark
FILL_ALPHA = 0.75


def confusion(truth: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels by true class and label, of C classes with background.

    truth: (H, W) uint8 of classes below C; 255 is ignored. label: likewise; 255 is a miss. Returns
    (C, C + 1) int64; rows are true classes, columns are labels, the last one void.
    """
    pairs = truth.astype(np.uint16) * np.uint16(256) + label
    counts = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)
    return counts[:num_classes, np.r_[:num_classes, VOID]]


def iou(counts: np.ndarray) -> np.ndarray:
    """(C,) float64 IoUs of a confusion matrix; nan if neither map has the class."""
    hits = counts.diagonal()
    union = counts.sum(1) + counts[:, :-1].sum(0) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def miou(counts: np.ndarray) -> float:
    """Mean IoU of the classes that occur, with background; nan if none does."""
    found = iou(counts)
    present = ~np.isnan(found)
    return float(found[present].mean()) if present.any() else math.nan


def pixel_accuracy(counts: np.ndarray) -> float:
    """Share of correct pixels among the scored ones; nan if there are none."""
    pixels = int(counts.sum())
    return int(np.trace(counts)) / pixels if pixels else math.nan


def compare(files: ImageFiles, images: Iterable[str] | None = None) -> dict[str, Any]:
    """Score the enhanced labels and, if given, the pseudo-labels of images with all their files.

    Args:
        files: with a ground truth.
        images: names of the images; None: all with a label, enhanced or not.

    Returns:
        ``iou`` (by class), ``miou`` and ``pixel_accuracy`` of the whole set, and "images": name and
        mIoU of each image. Scores are "before", "after" and "gain", or "after" alone; nan if
        undefined. ``num_images``, ``improved``, ``worsened``: numbers of compared images;
        ``problems``: name → message of the others.
    """
    kinds, names = {BEFORE, AFTER} & {*files.by_kind}, files.class_names
    if images is None:
        images = {name for kind in kinds for name in files.by_kind[kind]}

    def count(name: str) -> list[np.ndarray] | str:
        try:
            return _confusions(files.read_labels(name), len(names))
        except DatasetError as error:
            return str(error)

    images = sorted(set(images))
    totals = np.zeros((len(kinds), len(names), len(names) + 1), dtype=np.int64)
    scores: list[dict[str, Any]] = []
    problems = {}
    with ThreadPoolExecutor() as pool:
        for name, found in zip(images, pool.map(count, images), strict=True):
            if isinstance(found, str):
                problems[name] = found
            else:
                scores.append({"name": name, **_change(*map(miou, found))})
                totals += found
    gains = [score.get("gain", math.nan) for score in scores]
    changes = {"improved": sum(g > 0 for g in gains), "worsened": sum(g < 0 for g in gains)}
    by_class = zip(names, *(iou(of).tolist() for of in totals), strict=True)
    return {
        "num_images": len(scores),
        **(changes if BEFORE in kinds else {}),
        "iou": {name: _change(*values) for name, *values in by_class},
        "miou": _change(*map(miou, totals)),
        "pixel_accuracy": _change(*map(pixel_accuracy, totals)),
        "images": scores,
        "problems": problems,
    }


def _confusions(labels: Mapping[str, np.ndarray], num_classes: int) -> list[np.ndarray]:
    """Confusion matrices of an image's label maps ``BEFORE``, if given, and ``AFTER``."""
    kinds = [kind for kind in (BEFORE, AFTER) if kind in labels]
    return [confusion(labels[TRUTH], labels[kind], num_classes) for kind in kinds]


def _change(*values: float) -> dict[str, float]:
    """{"before", "after", "gain"} of two scores, {"after"} of one."""
    if len(values) == 1:
        return {"after": values[0]}
    before, after = values
    return {"before": before, "after": after, "gain": after - before}


class Row(NamedTuple):
    """Title with name and mIoUs, kind → (H', W', 3) uint8 picture, label maps."""

    title: str
    pictures: dict[str, np.ndarray]
    labels: list[np.ndarray]


def read_row(name: str, files: ImageFiles, masks: Path | None) -> Row:
    """Read and draw one image, and SAM's masks if their folder is given.

    DatasetError: a file is missing, damaged or of another size.
    """
    labels = files.read_labels(name)
    pixels = read_image(str(files.by_kind[IMAGE][name]), "RGB")
    pictures = {IMAGE: pixels} | {kind: draw_label(pixels, of) for kind, of in labels.items()}
    if masks is not None:
        rles = read_masks(masks, name, (pixels.shape[0], pixels.shape[1]))
        pictures[MASKS] = draw_masks(pixels, rles)
    title = name
    if TRUTH in labels:
        counts = _confusions(labels, len(files.class_names))
        before, after = (100 * miou(of) for of in counts)
        title += f"    mIoU {before:.1f} → {after:.1f} ({after - before:+.1f})"
    return Row(title, pictures, list(labels.values()))


def write_picture(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write a PNG of all rows and a legend; columns without pictures are omitted."""
    pictures = [[row.pictures.get(kind) for kind in COLUMNS] for row in rows]
    legend = legend_entries([label for row in rows for label in row.labels], names)
    panel_grid(pictures, list(COLUMNS.values()), path, [row.title for row in rows], legend)


def draw_label(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Draw an (H, W) uint8 label map in VOC's colors over an (H, W, 3) uint8 RGB image, which is
    gray and faded; returns (H, W, 3) uint8."""
    faded = _faded(image)
    filled = cv2.addWeighted(faded, 1 - FILL_ALPHA, palette()[label], FILL_ALPHA, 0)
    return np.where(label[..., None] == BACKGROUND, faded, filled)


def draw_masks(image: np.ndarray, masks: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """:func:`draw_label` of COCO RLEs: touching masks in different colors, smaller over larger; a
    small image is enlarged."""
    encoded = RLEMasks(masks, (image.shape[0], image.shape[1]))
    return overlay(_faded(image), encoded, [0] * len(masks), [""])


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
