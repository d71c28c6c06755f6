"""Which evaluator a data set needs."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from s4m_d2.errors import ConfigError
from s4m_d2.evaluation.cityscapes import CityscapesInstanceAP
from s4m_d2.evaluation.coco import COCOInstanceAP

COCO_TASKS = ("bbox", "segm")  # stated, so that a model without predictions has both results too


def build_evaluator(
    dataset_name: str, output_dir: str | None = None, *, max_detections: int | None = None
) -> DatasetEvaluator:
    """The evaluator for a registered data set, by its metadata's ``evaluator_type``.

    Args:
        dataset_name: a data set with evaluator_type "coco" or "cityscapes_instance".
        output_dir: COCO predictions are written there; None: nowhere. Cityscapes writes nothing.
        max_detections: of an image that count in COCO's AP; None: 100, as in published results.

    Raises:
        ConfigError: the data set has no evaluator of masks.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "cityscapes_instance":
        return CityscapesInstanceAP(dataset_name)
    if kind == "coco":
        return COCOInstanceAP(
            dataset_name,
            tasks=COCO_TASKS,
            output_dir=output_dir,
            max_dets_per_image=max_detections,
        )
    raise ConfigError(
        f"DATASETS.TEST: no evaluator for '{dataset_name}', whose evaluator_type is {kind!r}. Set "
        "MetadataCatalog.get(name).evaluator_type to 'coco' or 'cityscapes_instance'."
    )
