"""COCO's AP, from masks that are encoded already."""

from __future__ import annotations

from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from s4m_d2.structures import RLEMasks


class COCOInstanceAP(COCOEvaluator):
    """Detectron2's evaluator; it takes :class:`RLEMasks` as they are, and masks as ever."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Add the predictions of a batch, each mask as its run-length encoding."""
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            masks = instances.get_fields().get("pred_masks")
            if not isinstance(masks, RLEMasks):
                super().process([sample], [output])
                continue
            fields = {k: v for k, v in instances.get_fields().items() if k != "pred_masks"}
            rest = Instances(instances.image_size, **fields)
            super().process([sample], [{**output, "instances": rest}])
            results = self._predictions[-1]["instances"]
            for result, rle in zip(results, masks.rles, strict=True):
                counts = rle["counts"].decode("ascii")  # json has no bytes
                result["segmentation"] = {"size": rle["size"], "counts": counts}
