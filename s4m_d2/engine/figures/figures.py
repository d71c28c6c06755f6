"""Pictures of what happens to images: augmentation, views, pseudo-labels, ARP, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import Instances
from torch import Tensor

from s4m_d2.engine.labeling.pseudo_labeling import UnlabeledViews
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import teacher_masks
from s4m_d2.structures import PseudoLabels
from s4m_d2.visualization import Panels, outline, overlay

SCORE_SHOWN = 0.5  # predictions below it are not drawn
CAPTION = "A color stands for an instance; those of touching instances differ"
SWATCH_SIZE = 60, 96  # px, height and width
_MARGIN = 10  # px, of the outline in its swatch
_GRAY = 150

Sample = Mapping[str, Any]


def labeled_panels(rows: Sequence[Sequence[Sample]], names: Sequence[str], order: str) -> Panels:
    """Labeled images as they are, and in draws of augmentation.

    Args:
        rows: of :func:`~s4m_d2.engine.figures.figure_samples.labeled_samples`.
        names: of the classes; so everywhere here.
        order: "RGB" or "BGR", of the samples' channels; so everywhere here.
    """
    return Panels(
        ["labeled image", *(f"augmented, draw {draw}" for draw in range(1, len(rows[0])))],
        [[draw_truth(sample, names, order) for sample in row] for row in rows],
        caption=f"{CAPTION}.",
    )


def view_panels(samples: Sequence[Sample], strong: Sequence[Tensor], order: str) -> Panels:
    """The views of unlabeled images: what both start from, the teacher's and SAM's, the student's.

    Args:
        samples: with "image" and "image_weak".
        strong: (3, H, W) uint8 each.
    """
    rows = [
        [to_rgb(image, order) for image in (sample["image"], sample["image_weak"], view)]
        for sample, view in zip(samples, strong, strict=True)
    ]
    return Panels(["geometry", "weak view (teacher, SAM)", "strong view (student)"], rows)


def pseudo_label_panels(
    samples: Sequence[Sample],
    selections: Sequence[Selection],
    refined: Sequence[PseudoLabels],
    names: Sequence[str],
    order: str,
    *,
    refines: bool = True,
) -> Panels:
    """The truth, what the teacher labels, and what SAM makes of it.

    Without refinement (``refines``) there is no column for it.
    """
    rows = []
    for sample, selection, after in zip(samples, selections, refined, strict=True):
        weak_sample = {**sample, "image": sample["image_weak"]}
        weak = to_rgb(sample["image_weak"], order)
        truth = draw_truth(weak_sample, names, order)
        before = draw_labels(weak, at_image_size(selection, weak.shape[:2]), names, scores=True)
        rows.append([weak, truth, before, draw_labels(weak, after, names) if refines else None])
    columns = ["weak view", "ground truth", "teacher's pseudo-labels", "refined by SAM"]
    return Panels(columns, rows, caption=f"{CAPTION}. Percentages: the teacher's class scores.")


def arp_panels(
    samples: Sequence[Sample], views: UnlabeledViews, names: Sequence[str], order: str
) -> Panels:
    """Images and labels before and after the exchange of instances, and what the student sees."""
    refined, pasted = views.refined, views.arp_labels
    rows = []
    for i, sample in enumerate(samples):
        before, after = to_rgb(sample["image"], order), to_rgb(views.arp_images[i], order)
        outlined = outline(draw_labels(after, pasted[i], names), (before != after).any(2))
        student = to_rgb(views.student_batch[i]["image"], order)
        rows.append([draw_labels(before, refined[i], names), outlined, student])
    columns = ["before the paste", "after the paste", "student's input (strong view)"]
    legend = [("pasted from the partner", _outline_swatch())]
    return Panels(columns, rows, legend=legend, caption=f"{CAPTION}.")


def prediction_panels(
    samples: Sequence[Sample],
    found: Mapping[str, Sequence[Instances]],
    names: Sequence[str],
    order: str,
) -> Panels:
    """Images, their truth, and each model's predictions.

    Args:
        samples: with "image" and "instances".
        found: name of a model → its predictions for each sample, at the sample's size.
    """
    rows = []
    for i, sample in enumerate(samples):
        image = to_rgb(sample["image"], order)
        models = [draw_found(image, instances[i], names) for instances in found.values()]
        rows.append([image, draw_truth(sample, names, order), *models])
    columns = ["image", "ground truth", *found]
    shown = f"Percentages: scores; from {SCORE_SHOWN:.0%} on."
    return Panels(columns, rows, caption=f"{CAPTION}. {shown}")


def draw_truth(sample: Sample, names: Sequence[str], order: str = "RGB") -> np.ndarray:
    """A sample's "image" with its "instances"."""
    truth = sample["instances"]
    image = to_rgb(sample["image"], order)
    return overlay(image, truth.gt_masks.tensor, truth.gt_classes, names)


def draw_labels(
    image: np.ndarray, labels: PseudoLabels, names: Sequence[str], *, scores: bool = False
) -> np.ndarray:
    """An image with pseudo-labels of its size."""
    shown = labels.scores.tolist() if scores else None
    return overlay(image, labels.masks.cpu(), labels.labels.tolist(), names, shown)


def draw_found(image: np.ndarray, found: Instances, names: Sequence[str]) -> np.ndarray:
    """An image with predictions of its size, those of at least SCORE_SHOWN."""
    found = found[found.scores >= SCORE_SHOWN]
    masks = found.pred_masks.to("cpu")
    return overlay(image, masks, found.pred_classes.tolist(), names, found.scores.tolist())


def at_image_size(selection: Selection, size: tuple[int, int]) -> PseudoLabels:
    """The teacher's kept predictions with masks of ``size`` (H, W)."""
    return selection.labels.with_masks(teacher_masks(selection, size))


def to_rgb(image: Tensor, order: str = "RGB") -> np.ndarray:
    """(3, H, W) uint8 in ``order`` → (H, W, 3) RGB array."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(array if order == "RGB" else array[:, :, ::-1])


def _outline_swatch() -> np.ndarray:
    inside = np.zeros(SWATCH_SIZE, dtype=bool)
    inside[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    return outline(np.full((*SWATCH_SIZE, 3), _GRAY, dtype=np.uint8), inside)
