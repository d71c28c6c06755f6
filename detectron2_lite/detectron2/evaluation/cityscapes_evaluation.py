"""Instance AP with Cityscapes' own scripts."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from PIL import Image

from .evaluator import DatasetEvaluator

logger = logging.getLogger(__name__)


class CityscapesInstanceEvaluator(DatasetEvaluator):
    """AP and AP50 of instance masks; the data set has the metadata "thing_classes" and "gt_dir".

    Every image of ``gt_dir`` counts, so each must be processed. All processes, on one machine,
    write masks into one temporary folder, and the main one evaluates; nothing is written anywhere
    else. Cityscapes ignores ground truth under 100 pixels.
    """

    def __init__(self, dataset_name: str):
        self._metadata = MetadataCatalog.get(dataset_name)

    def reset(self) -> None:
        assert comm.get_local_size() == comm.get_world_size(), "works on one machine only"
        self._working_dir = tempfile.TemporaryDirectory(prefix="cityscapes_eval_")
        self._temp_dir = comm.all_gather(self._working_dir.name)[0]
        if self._temp_dir != self._working_dir.name:
            self._working_dir.cleanup()
        logger.info(f"Writing cityscapes results to temporary directory {self._temp_dir}")

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Args: inputs with "file_name"; outputs with "instances": scores, pred_classes and
        pred_masks (N, H, W) in the frame of the ground truth."""
        from cityscapesscripts.helpers.labels import name2label

        for image, output in zip(inputs, outputs, strict=True):
            stem = os.path.splitext(os.path.basename(image["file_name"]))[0]
            instances, lines = output["instances"].to("cpu"), []
            for i, mask in enumerate(instances.pred_masks):
                name = self._metadata.thing_classes[instances.pred_classes[i]]
                mask_file = f"{stem}_{i}_{name}.png"
                pixels = np.asarray(mask).astype(np.uint8) * 255
                Image.fromarray(pixels).save(os.path.join(self._temp_dir, mask_file))
                lines.append(f"{mask_file} {name2label[name].id} {float(instances.scores[i])}\n")
            with open(os.path.join(self._temp_dir, stem + "_pred.txt"), "w") as file:
                file.writelines(lines)  # an image without predictions has an empty list

    def evaluate(self) -> dict | None:
        """{"segm": {"AP", "AP50"}} in percent on the main process, None on others."""
        comm.synchronize()
        if not comm.is_main_process():
            return None
        logger.info(f"Evaluating results under {self._temp_dir} ...")
        pattern = os.path.join(self._metadata.gt_dir, "*", "*_gtFine_instanceIds.png")
        ground_truth = sorted(glob.glob(os.path.abspath(pattern)))
        assert ground_truth, f"no ground truth found; searched for {pattern}"
        averages = _score(self._temp_dir, ground_truth)
        self._working_dir.cleanup()
        scores = {"AP": averages["allAp"] * 100, "AP50": averages["allAp50%"] * 100}
        return OrderedDict(segm=scores)


def _score(prediction_dir: str, ground_truth: list[str]) -> dict:
    """The steps of Cityscapes' ``evaluateImgLists``, which writes into the working folder."""
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts
    from cityscapesscripts.evaluation.instances2dict import instances2dict

    if not hasattr(np, "in1d"):  # NumPy 2.4 dropped what cityscapesScripts 2.3.0 calls
        scripts.np = SimpleNamespace(**vars(np), in1d=np.isin)
    args = scripts.args
    args.predictionPath, args.predictionWalk = os.path.abspath(prediction_dir), None
    args.quiet, args.colorized = True, False
    predictions = [scripts.getPrediction(path, args) for path in ground_truth]
    scripts.setInstanceLabels(args)
    instances = instances2dict(ground_truth, verbose=False)
    matches = scripts.matchGtWithPreds(predictions, ground_truth, instances, args)
    averages = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
    scripts.printResults(averages, args)
    return averages
