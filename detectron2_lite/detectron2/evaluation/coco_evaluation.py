"""Box and mask AP with pycocotools."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .evaluator import DatasetEvaluator

logger = logging.getLogger(__name__)

_TASKS = ("bbox", "segm")
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_NAN = float("nan")


class COCOEvaluator(DatasetEvaluator):
    """COCO's AP of boxes and masks, in percent, for a data set with the metadata "json_file".

    Args:
        tasks: of "bbox" and "segm"; by default what the predictions have.
        output_dir: folder for coco_instances_results.json.
        max_dets_per_image: detections that count, 100 by default.
        use_fast_impl: accepted for compatibility; pycocotools' own code is always used.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        *,
        output_dir: str | None = None,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
    ):
        self._tasks, self._output_dir = tasks, output_dir
        self._max_dets = [1, 10, 100 if max_dets_per_image is None else max_dets_per_image]
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            raise ValueError(f"'{dataset_name}' is not in COCO format: it has no json_file")
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api = COCO(PathManager.get_local_path(self._metadata.json_file))
        self._do_evaluation = "annotations" in self._coco_api.dataset  # test sets have none

    def reset(self) -> None:
        self._predictions: list[dict] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Args: inputs with "image_id"; outputs with "instances", in the image's own frame."""
        for image, output in zip(inputs, outputs, strict=True):
            if "instances" in output:
                image_id, instances = image["image_id"], output["instances"].to("cpu")
                results = instances_to_coco_json(instances, image_id)
                self._predictions.append({"image_id": image_id, "instances": results})

    def evaluate(self) -> dict:
        """{task: {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-<class>"}}; NaN: not defined.

        {} on other processes than the main one, and without predictions or annotations.
        """
        predictions = list(itertools.chain(*comm.gather(self._predictions)))
        if not comm.is_main_process():
            return {}
        if not predictions:
            logger.warning("[COCOEvaluator] Did not receive valid predictions.")
            return {}
        results = [dict(result) for image in predictions for result in image["instances"]]
        has_masks = any("segmentation" in result for result in results)
        tasks = self._tasks or (_TASKS if has_masks else _TASKS[:1])
        self._to_dataset_ids(results)
        if self._output_dir:
            self._save(results)
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return {}
        return OrderedDict((task, self._evaluate_task(results, task)) for task in tasks)

    def _to_dataset_ids(self, results: list[dict]) -> None:
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        dataset_ids = {contiguous: dataset_id for dataset_id, contiguous in (mapping or {}).items()}
        for result in results if mapping else ():
            label = result["category_id"]
            assert label in dataset_ids, f"class {label} predicted, but there are {dataset_ids}"
            result["category_id"] = dataset_ids[label]

    def _save(self, results: list[dict]) -> None:
        os.makedirs(self._output_dir, exist_ok=True)
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump(results, file)
        os.replace(path + ".tmp", path)
        logger.info(f"Results saved to {path}")

    def _evaluate_task(self, results: list[dict], task: str) -> dict[str, float]:
        assert task in _TASKS, f"unknown task: {task}"
        if not results:
            logger.warning("No predictions from the model!")
            return dict.fromkeys(_METRICS, _NAN)
        # pycocotools writes into its input, and without "bbox" it takes a mask's own area
        without = {"bbox"} if task == "segm" else set()
        results = [{key: r[key] for key in r.keys() - without} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            coco_eval = COCOeval(self._coco_api, self._coco_api.loadRes(results), task)
            coco_eval.params.maxDets = self._max_dets
            coco_eval.evaluate()
            coco_eval.accumulate()
        scores = _summarize(coco_eval, self._metadata.get("thing_classes"))
        main = create_small_table({name: scores[name] for name in _METRICS})
        classes = ", ".join(f"{k[3:]} {v:.3f}" for k, v in scores.items() if k.startswith("AP-"))
        logger.info(f"Evaluation results for {task}:\n{main}\nAP of classes: {classes}")
        return scores


def _summarize(coco_eval: COCOeval, class_names: Sequence[str] | None) -> dict[str, float]:
    """The scores, all at the largest number of detections, which COCOeval.summarize cannot do."""
    # (IoU thresholds, recalls, classes, areas "all", "small", …), -1 where not defined
    precision = coco_eval.eval["precision"][..., -1]
    overall, sizes = precision[..., 0], (precision[..., i] for i in (1, 2, 3))
    at = {iou: np.isclose(coco_eval.params.iouThrs, iou) for iou in (0.5, 0.75)}
    parts = dict(zip(_METRICS, (overall, overall[at[0.5]], overall[at[0.75]], *sizes), strict=True))
    if class_names is not None and len(class_names) > 1:
        classes = zip(class_names, np.moveaxis(overall, 2, 0), strict=True)
        parts.update({f"AP-{name}": part for name, part in classes})
    valid = {name: part[part > -1] for name, part in parts.items()}
    return {name: float(v.mean() * 100) if v.size else _NAN for name, v in valid.items()}


def instances_to_coco_json(instances: Instances, img_id: int) -> list[dict]:
    """COCO's result dicts of an image's instances, on the CPU; ``category_id`` is the class."""
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    fields = boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
    results = [
        {"image_id": img_id, "category_id": label, "bbox": box, "score": score}
        for box, score, label in zip(*fields, strict=True)
    ]
    if instances.has("pred_masks"):
        for result, mask in zip(results, instances.pred_masks, strict=True):
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            rle["counts"] = rle["counts"].decode("ascii")  # json has no bytes
            result["segmentation"] = rle
    return results
