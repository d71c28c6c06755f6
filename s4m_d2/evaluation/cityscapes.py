"""Cityscapes' instance AP, by Cityscapes' own scripts."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.utils import comm
from PIL import Image

from s4m_d2.errors import DatasetError

logger = logging.getLogger(__name__)

IMAGE, TRUTH, PREDICTION = "_leftImg8bit", "_gtFine_instanceIds.png", "_pred.txt"  # ends of names


class CityscapesInstanceAP(CityscapesInstanceEvaluator):
    """Detectron2's evaluator, with AP by class, of the processed images only.

    The data set's metadata has ``thing_classes`` (Cityscapes' own names) and ``gt_dir``, the folder
    of ``CITY/*_gtFine_instanceIds.png``. All instances of an image without predictions count as
    missed. The processes of one machine share a temporary folder, which is removed afterwards.
    """

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Write a batch's predictions as Cityscapes' scripts read them.

        Detectron2's own method imports these scripts from a package that is not public.
        """
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
        """{"segm": AP, AP50 and AP-CLASS in percent}; None on other processes than the first.

        Raises:
            DatasetError: no processed image has a ground truth under ``gt_dir``.
        """
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
            raise DatasetError(
                f"'{name}' cannot be evaluated: of {len(truths)} ground truths "
                f"'{self._metadata.gt_dir}/CITY/*{TRUTH}' none is of an evaluated image. "
                "Check the folder gtFine of the data set."
            )
        if len(common) < len(truths):
            logger.warning("'%s': evaluated %d of %d images", name, len(common), len(truths))
        return [truths[stem] for stem in common], [found[stem] for stem in common]
