"""Cityscapes' instance AP, by Cityscapes' own scripts."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from PIL import Image

from s4m_d2.errors import DatasetError

logger = logging.getLogger(__name__)

IMAGE_SUFFIX = "_leftImg8bit"
TRUTH_SUFFIX = "_gtFine_instanceIds.png"


class CityscapesInstanceAP(DatasetEvaluator):
    """Mask AP and AP50 over the processed images, in percent.

    Predictions are written to a temporary folder, shared by the processes of one machine and
    removed afterwards. All instances of an image without predictions count as missed.

    Args:
        dataset_name: a registered data set whose metadata has ``thing_classes`` (Cityscapes' own
            names) and ``gt_dir``, the folder of ``CITY/*_gtFine_instanceIds.png``.
    """

    def __init__(self, dataset_name: str) -> None:
        self._dataset_name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)

    def reset(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cityscapes_eval_")
        self._root = comm.all_gather(self._folder.name)[0]

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Write each image's masks, classes and scores as Cityscapes' scripts read them."""
        from cityscapesscripts.helpers.labels import name2label

        ids = [name2label[name].id for name in self._metadata.thing_classes]
        for sample, output in zip(inputs, outputs, strict=True):
            stem = _stem(sample["file_name"])
            instances = output["instances"]
            labels, scores = instances.pred_classes.tolist(), instances.scores.tolist()
            lines = []
            for i, mask in enumerate(instances.pred_masks):  # one at a time: they may be encoded
                name = f"{stem}_{i}.png"
                pixels = mask.cpu().numpy().astype(bool)
                Image.fromarray(pixels).save(os.path.join(self._root, name))
                lines.append(f"{name} {ids[labels[i]]} {scores[i]}\n")
            Path(self._root, f"{stem}.txt").write_text("".join(lines))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"segm": AP, AP50 and AP-CLASS in percent}; None on other processes than the first.

        Raises:
            DatasetError: no processed image has a ground truth under ``gt_dir``.
        """
        comm.synchronize()
        results = self._evaluate() if comm.is_main_process() else None
        comm.synchronize()
        self._folder.cleanup()
        return results

    def _evaluate(self) -> dict[str, dict[str, float]]:
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as scripts
        from cityscapesscripts.evaluation.instances2dict import instances2dict

        if not hasattr(np, "in1d"):  # NumPy 2.4 dropped what cityscapesScripts 2.3.0 calls
            scripts.np = SimpleNamespace(**vars(np), in1d=np.isin)
        truths, predictions = self._pairs()
        args = copy.copy(scripts.args)  # the scripts' settings are global: leave them alone
        args.predictionPath = os.path.abspath(self._root)
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
        truths = sorted(Path(self._metadata.gt_dir).glob(f"*/*{TRUTH_SUFFIX}"))
        files = [(t, Path(self._root, t.name.removesuffix(TRUTH_SUFFIX) + ".txt")) for t in truths]
        pairs = [(str(truth), str(found)) for truth, found in files if found.exists()]
        if not pairs:
            raise DatasetError(
                f"'{self._dataset_name}' cannot be evaluated: of {len(truths)} ground truths "
                f"'{self._metadata.gt_dir}/CITY/*{TRUTH_SUFFIX}' none is of an evaluated image. "
                "Check the folder gtFine of the data set."
            )
        if len(pairs) < len(truths):
            logger.warning(
                "'%s': evaluated %d of %d images", self._dataset_name, len(pairs), len(truths)
            )
        return [truth for truth, _ in pairs], [found for _, found in pairs]


def _stem(file_name: str) -> str:
    """aachen_000000_000019 of .../aachen_000000_000019_leftImg8bit.png."""
    return Path(file_name).stem.removesuffix(IMAGE_SUFFIX)
