"""COCO's AP and result files from encoded masks, and the choice of a data set's evaluator."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Instances
from torch import nn

from s4m_d2.errors import ConfigError
from s4m_d2.evaluation.cityscapes import CityscapesInstanceAP
from s4m_d2.files import atomic_write
from s4m_d2.structures import RLEMasks, as_rles, plain_rle

RESULTS = "predictions.json"
IMAGES = "images.json"

Add = Callable[[Mapping[str, Any], Instances], None]


def build_evaluator(
    dataset_name: str, output_dir: str | None = None, *, max_detections: int | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a registered data set, by its metadata's ``evaluator_type``.

    Args:
        output_dir: folder for COCO predictions; None: not written. Cityscapes writes nothing.
        max_detections: detections per image in COCO's AP; None: 100, as in published results.

    Raises:
        ConfigError: the data set has no mask evaluator.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "cityscapes_instance":
        return CityscapesInstanceAP(dataset_name)
    if kind == "coco":
        tasks = ("bbox", "segm")  # explicit, so that a model without predictions has both results
        limit = {"max_dets_per_image": max_detections}
        return COCOInstanceAP(dataset_name, tasks=tasks, output_dir=output_dir, **limit)
    raise ConfigError(
        f"DATASETS.TEST: no evaluator for '{dataset_name}', whose evaluator_type is {kind!r}. Set "
        "MetadataCatalog.get(name).evaluator_type to 'coco' or 'cityscapes_instance'."
    )


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


@contextmanager
def masks_as_rle(model: nn.Module) -> Iterator[None]:
    """Make ``model`` return :class:`~s4m_d2.structures.RLEMasks` inside, if it has ``rle_masks``.

    A hundred masks of a 2,000 x 4,000 image take 800 MB as a tensor and some hundred KiB encoded;
    evaluators give the same results for both.
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


@contextmanager
def write_coco_results(
    folder: str | os.PathLike[str], class_names: Sequence[str], category_ids: Sequence[int]
) -> Iterator[Add]:
    """Write predictions.json (COCO's results) and images.json (its images and categories).

    ``COCO("images.json").loadRes("predictions.json")`` reads both. They are written when the block
    ends; if it raises, older files are unchanged. Only one image's masks are in memory at a time.

    Yields a function that takes an image, {"file_name", "height", "width", ...}, which gets the
    next "id" from 1 on, and its Instances with ``pred_masks`` of that size, ``pred_classes`` and
    ``scores``. Results have category_id, segmentation (compressed RLE), bbox (x, y, w, h) and
    score. ``category_ids`` are those of the model's classes in the data set.

    Raises:
        OutputError: a file cannot be written.
    """
    categories = [
        {"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)
    ]
    with (
        atomic_write(os.path.join(folder, IMAGES)) as images_file,
        atomic_write(os.path.join(folder, RESULTS)) as results_file,
    ):
        content: dict[str, Any] = {"info": {}, "categories": categories, "annotations": []}
        images = content["images"] = []
        results_file.write("[")
        separator = "\n"

        def add(image: Mapping[str, Any], instances: Instances) -> None:
            nonlocal separator
            images.append({"id": len(images) + 1, **image})
            rles = as_rles(instances.pred_masks)
            labels, scores = instances.pred_classes.tolist(), instances.scores.tolist()
            for rle, label, score in zip(rles, labels, scores, strict=True):
                result = {
                    "image_id": len(images),
                    "category_id": category_ids[label],
                    "segmentation": plain_rle(rle),
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "score": score,
                }
                results_file.write(separator + json.dumps(result))
                separator = ",\n"

        yield add
        results_file.write("\n]\n")
        json.dump(content, images_file)
