"""Mask AP by COCO's or Cityscapes' measure, and the quality of pseudo-labels.

The quality of pseudo-labels is measured with true labels (the paper's figure 1):

**Matches.** In each image, pseudo-labels and true instances are matched one to one, independent of
their classes, if the IoU of their masks exceeds 0.5, in the order of falling IoU. (Of equal IoUs
the higher score comes first, then the right class, then the lower class id.)

**Crowds.** As in COCO's evaluation, crowds (``iscrowd``) are not matched, and an unmatched
pseudo-label with more than half of its pixels in a crowd is ignored, here of any class.

**Sizes** are COCO's, by the pixels of the mask: a match has the size of the true instance, an
unmatched pseudo-label its own, so that the sizes add up to the whole.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, COCOEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from torch import Tensor, nn

from s4m_d2.errors import ConfigError, DatasetError, InputError
from s4m_d2.structures import PseudoLabels, RLEMasks, dense_overlaps, mask_areas, plain_rle
from s4m_d2.transfers import to_device, to_host

logger = logging.getLogger(__name__)

# Ends of the names of Cityscapes' files.
IMAGE, TRUTH, PREDICTION = "_leftImg8bit", "_gtFine_instanceIds.png", "_pred.txt"

IOU_THRESH = 0.5  # of a match; below it an instance could match several disjoint masks
CROWD_THRESH = 0.5  # an unmatched pseudo-label with more of its pixels in a crowd is ignored
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (32.0**2, 96.0**2)  # px: medium begins at the first, large at the second (COCO)
NO_MATCH = -1
# Counts, for each size and class.
COUNTS = (
    "instances",  # true ones, without crowds
    "found",  # matched true instances
    "pseudo_labels",  # without those in crowds
    "matched",  # matched pseudo-labels
    "duplicates",  # unmatched, but IoU above 0.5 with an instance that another one matches
    "correct",  # matches with the right class
    "in_crowds",  # ignored pseudo-labels
    "iou_found",  # sum of the IoUs of matches
    "iou_correct",  # sum of the IoUs of matches with the right class
)
# Ratio of a count to another one, or to the mean of two. By class, "pseudo_labels" and "matched"
# are counted by the predicted class, "instances" and "found" by the true class.
MEASURES = {
    "class_accuracy": ("correct", "found"),
    "sq": ("iou_found", "found"),  # segmentation quality: the mean IoU of matches
    "precision": ("correct", "pseudo_labels"),
    "recall": ("correct", "instances"),
    "mask_precision": ("matched", "pseudo_labels"),  # independent of the class
    "mask_recall": ("found", "instances"),
    "rq": ("correct", "pseudo_labels", "instances"),  # recognition quality: the harmonic mean
    # Panoptic quality of all classes together; benchmarks use the mean over classes.
    "pq": ("iou_correct", "pseudo_labels", "instances"),
}

Quality = dict[str, float | None]  # MEASURES (None: undefined) and COUNTS without sums of IoUs


def build_evaluator(
    dataset_name: str, output_dir: str | None = None, *, max_detections: int | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a registered data set, by its metadata's ``evaluator_type``.

    COCO's writes predictions into ``output_dir`` (None: it does not) and counts ``max_detections``
    per image (None: 100, as in published results). ConfigError: there is no such mask evaluator.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "cityscapes_instance":
        return CityscapesInstanceAP(dataset_name)
    if kind == "coco":
        tasks = ("bbox", "segm")  # explicit, so that a model without predictions has both results
        limit = {"max_dets_per_image": max_detections}
        return COCOInstanceAP(dataset_name, tasks=tasks, output_dir=output_dir, **limit)
    expected = "'coco' or 'cityscapes_instance'"
    raise ConfigError(f"'{dataset_name}' has the evaluator_type {kind!r}; expected {expected}.")


class COCOInstanceAP(COCOEvaluator):
    """Detectron2's evaluator, which also accepts :class:`RLEMasks`."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predictions of a batch; RLEs are not decoded."""
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            masks = instances.get_fields().get("pred_masks")
            if not isinstance(masks, RLEMasks):
                super().process([sample], [output])
                continue
            rest = Instances(instances.image_size, **instances.get_fields())
            rest.remove("pred_masks")
            super().process([sample], [{**output, "instances": rest}])
            results = self._predictions[-1]["instances"]
            for result, rle in zip(results, masks.rles, strict=True):
                result["segmentation"] = plain_rle(rle)


class CityscapesInstanceAP(CityscapesInstanceEvaluator):
    """Detectron2's evaluator, with AP by class, of the processed images only.

    The data set's metadata has ``thing_classes`` (Cityscapes' own names) and ``gt_dir``, the folder
    of ``CITY/*_gtFine_instanceIds.png``. All instances of an image without predictions count as
    missed. The processes of one machine share a temporary folder, which is removed afterwards.
    """

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Write a batch's predictions; Detectron2's method imports a package that is not public."""
        from cityscapesscripts.helpers.labels import name2label

        ids = [name2label[name].id for name in self._metadata.thing_classes]
        for sample, output in zip(inputs, outputs, strict=True):
            stem, instances = Path(sample["file_name"]).stem, output["instances"]
            labels, scores = instances.pred_classes.tolist(), instances.scores.tolist()
            lines = []
            for i, mask in enumerate(instances.pred_masks):  # one at a time: they may be encoded
                image = Image.fromarray(mask.cpu().numpy().astype(bool))
                image.save(os.path.join(self._temp_dir, f"{stem}_{i}.png"))
                lines.append(f"{stem}_{i}.png {ids[labels[i]]} {scores[i]}\n")
            Path(self._temp_dir, stem + PREDICTION).write_text("".join(lines))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"segm": AP, AP50 and AP-CLASS in percent}; None on other processes than the first."""
        comm.synchronize()  # until all have written their predictions
        if not comm.is_main_process():
            return None
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as scripts
        from cityscapesscripts.evaluation.instances2dict import instances2dict

        if not hasattr(np, "in1d"):  # NumPy 2.4 dropped what cityscapesScripts 2.3.0 calls
            scripts.np = SimpleNamespace(**vars(np), in1d=np.isin)
        args = copy.copy(scripts.args)  # the scripts' settings are global: leave them alone
        args.predictionPath, args.quiet = os.path.abspath(self._temp_dir), True
        scripts.setInstanceLabels(args)
        with self._working_dir:
            truths, predictions = self._pairs()
            truth_instances = instances2dict(truths, verbose=False)
            matches = scripts.matchGtWithPreds(predictions, truths, truth_instances, args)
        averages = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
        of_classes = {f"AP-{n}": averages["classes"][n]["ap"] for n in self._metadata.thing_classes}
        segm = {"AP": averages["allAp"], "AP50": averages["allAp50%"], **of_classes}
        return {"segm": {name: 100 * float(value) for name, value in segm.items()}}

    def _pairs(self) -> tuple[list[str], list[str]]:
        """Files of ground truth and predictions of the processed images."""
        truths = {
            path.name.removesuffix(TRUTH): str(path)
            for path in sorted(Path(self._metadata.gt_dir).glob(f"*/*{TRUTH}"))
        }
        found = {
            path.name.removesuffix(PREDICTION).removesuffix(IMAGE): str(path)
            for path in Path(self._temp_dir).glob(f"*{PREDICTION}")
        }
        common, name = [stem for stem in truths if stem in found], self._metadata.name
        if not common:
            expected = f"{self._metadata.gt_dir}/CITY/*{TRUTH}"
            raise DatasetError(f"'{name}': '{expected}' holds no evaluated image. Add it.")
        if len(common) < len(truths):
            logger.warning("'%s': evaluated %d of %d images", name, len(common), len(truths))
        return [truths[stem] for stem in common], [found[stem] for stem in common]


@contextmanager
def masks_as_rle(model: nn.Module) -> Iterator[None]:
    """Make ``model`` return :class:`~s4m_d2.structures.RLEMasks` inside, if it has ``rle_masks``.

    A hundred masks of a 2,000 x 4,000 image take 800 MB as a tensor, some hundred KiB encoded.
    """
    switch: Any = model if hasattr(model, "rle_masks") else SimpleNamespace(rle_masks=False)
    before, switch.rle_masks = switch.rle_masks, True
    try:
        yield
    finally:
        switch.rle_masks = before


def quality_of(counts: np.ndarray) -> Quality:
    """Compute the measures from (9,) ``COUNTS``; also returns the counts."""
    known = dict(zip(COUNTS, counts.tolist(), strict=True))
    quality: Quality = {}
    for name, (part, *wholes) in MEASURES.items():
        whole = sum(known[of] for of in wholes) / len(wholes)
        quality[name] = known[part] / whole if whole else None
    return quality | {name: int(n) for name, n in known.items() if not name.startswith("iou")}


class PseudoLabelQuality:
    """Accumulates the quality of pseudo-labels over images, in any order and in several processes.

    The K classes are named in the order of their ids, all differently.

    >>> quality = PseudoLabelQuality(["apple", "pear"])
    >>> masks = torch.zeros(2, 10, 10, dtype=torch.bool)
    >>> masks[0, :5], masks[1, 6:] = True, True
    >>> labels = PseudoLabels(torch.tensor([0, 0]), masks, torch.tensor([0.9, 0.8]))
    >>> quality.add(labels, torch.tensor([0, 1]), masks)
    >>> quality.overall()["class_accuracy"], quality.by_class()["pear"]["sq"]
    (0.5, 1.0)
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        if not self.class_names or len(set(self.class_names)) < len(self.class_names):
            raise InputError(f"class names must be different ones, got {self.class_names}")
        self.images = 0  #: added so far
        #: (3, K, 9) float64, ``COUNTS`` for each size and class
        self.cells = np.zeros((len(SIZES), len(self.class_names), len(COUNTS)))

    def add(
        self,
        labels: PseudoLabels,
        classes: Tensor,
        masks: Tensor,
        crowds: Tensor | None = None,
        *,
        pixel_area: float = 1.0,
    ) -> None:
        """Compare an image's N pseudo-labels with its M true instances.

        Args:
            classes: (M,) int64.
            masks: (M, H, W) bool, in the frame of the labels' masks; they may overlap.
            crowds: (M,) bool; None: no crowds.
            pixel_area: px of the image in a pixel of the masks; sizes are areas in the image.
        """
        device = labels.masks.device
        masks, classes = to_device(masks, device), to_device(classes, device)
        crowds = classes.new_zeros(len(classes)).bool() if crowds is None else crowds
        crowds = to_device(crowds, device)
        pixels = dense_overlaps(labels.masks, masks), mask_areas(labels.masks), mask_areas(masks)
        overlaps, areas, true_areas, scores, ids, true_ids, is_crowd = to_host(
            *pixels, labels.scores.double(), labels.labels, classes, crowds
        )
        in_crowd = np.any(overlaps[:, is_crowd] > CROWD_THRESH * areas[:, None], axis=1)
        overlaps = overlaps[:, ~is_crowd]
        true_areas, true_ids = true_areas[~is_crowd], true_ids[~is_crowd]
        iou = overlaps / np.maximum(areas[:, None] + true_areas - overlaps, 1)
        match = match_masks(iou, scores, ids, true_ids)
        px = areas * pixel_area, true_areas * pixel_area
        sizes, true_sizes = (np.searchsorted(SIZE_LIMITS, of, side="right") for of in px)
        self._count(match, iou, (sizes, ids), (true_sizes, true_ids), in_crowd)
        self.images += 1

    def _count(
        self, match: np.ndarray, iou: np.ndarray, labels: tuple, truth: tuple, in_crowd: np.ndarray
    ) -> None:
        """Add an image's counts: (N,) ``match``, (N, M) ``iou``, sizes and ids of both sides."""

        def count(name: str, cells: Sequence[np.ndarray], values: Any = 1) -> None:
            np.add.at(self.cells[..., COUNTS.index(name)], tuple(cells), values)

        is_match = match != NO_MATCH
        ignored = in_crowd & ~is_match
        rows = np.flatnonzero(is_match)
        found, ious = [of[match[rows]] for of in truth], iou[rows, match[rows]]
        sizes, ids = labels
        sizes[rows] = found[0]
        is_right = ids[rows] == found[1]
        count("instances", truth)
        count("found", found)
        count("iou_found", found, ious)
        count("correct", [of[is_right] for of in found])
        count("iou_correct", [of[is_right] for of in found], ious[is_right])
        duplicates = ~ignored & ~is_match & (iou > IOU_THRESH).any(axis=1)
        chosen = {"pseudo_labels": ~ignored, "in_crowds": ignored, "matched": is_match}
        for name, rows in (chosen | {"duplicates": duplicates}).items():
            count(name, (sizes[rows], ids[rows]))

    def merge(self, other: PseudoLabelQuality) -> None:
        """Add the counts of another one with the same classes."""
        self.images += other.images
        self.cells += other.cells

    def overall(self) -> Quality:
        """Quality of all pseudo-labels."""
        return quality_of(self.cells.sum(axis=(0, 1)))

    def by_class(self) -> dict[str, Quality]:
        """Quality by class name."""
        return dict(zip(self.class_names, map(quality_of, self.cells.sum(axis=0)), strict=True))

    def by_size(self) -> dict[str, Quality]:
        """Quality by size name."""
        return dict(zip(SIZES, map(quality_of, self.cells.sum(axis=1)), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"overall": self.overall(), "by_class": self.by_class(), "by_size": self.by_size()}


def match_masks(
    iou: np.ndarray, scores: np.ndarray, classes: np.ndarray, true_classes: np.ndarray
) -> np.ndarray:
    """Match N pseudo-labels with M true instances, in the order of falling (N, M) ``iou``.

    Returns:
        (N,) int64, the instance matched by each pseudo-label, or NO_MATCH.
    """
    rows, columns = np.nonzero(iou > IOU_THRESH)
    is_wrong = classes[rows] != true_classes[columns]
    ties = (true_classes[columns], classes[rows], is_wrong, -scores[rows])
    match = np.full(len(iou), NO_MATCH, dtype=np.int64)
    taken = np.zeros(iou.shape[1], dtype=bool)
    for pair in np.lexsort((*ties, -iou[rows, columns])):
        row, column = rows[pair], columns[pair]
        if match[row] == NO_MATCH and not taken[column]:
            match[row], taken[column] = column, True
    return match
