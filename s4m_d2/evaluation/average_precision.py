"""Mask AP by COCO's or Cityscapes' measure, from encoded masks."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
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
from torch import nn

from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.structures import RLEMasks, plain_rle

logger = logging.getLogger(__name__)

# Ends of the names of Cityscapes' files.
IMAGE, TRUTH, PREDICTION = "_leftImg8bit", "_gtFine_instanceIds.png", "_pred.txt"


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
        with self._working_dir:
            return self._evaluate()

    def _evaluate(self) -> dict[str, dict[str, float]]:
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as scripts
        from cityscapesscripts.evaluation.instances2dict import instances2dict

        if not hasattr(np, "in1d"):  # NumPy 2.4 dropped what cityscapesScripts 2.3.0 calls
            scripts.np = SimpleNamespace(**vars(np), in1d=np.isin)
        truths, predictions = self._pairs()
        args = copy.copy(scripts.args)  # the scripts' settings are global: leave them alone
        args.predictionPath = os.path.abspath(self._temp_dir)
        args.quiet = True
        scripts.setInstanceLabels(args)
        truth_instances = instances2dict(truths, verbose=False)
        matches = scripts.matchGtWithPreds(predictions, truths, truth_instances, args)
        averages = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
        segm = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
        segm |= {
            f"AP-{name}": averages["classes"][name]["ap"] for name in self._metadata.thing_classes
        }
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
    if not hasattr(model, "rle_masks"):
        yield
        return
    switch: Any = model
    before, switch.rle_masks = switch.rle_masks, True
    try:
        yield
    finally:
        switch.rle_masks = before
