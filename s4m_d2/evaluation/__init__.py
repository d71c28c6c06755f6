"""Mask AP, by the measure that the data set comes with."""

from s4m_d2.evaluation.build import build_evaluator
from s4m_d2.evaluation.cityscapes import CityscapesInstanceAP
from s4m_d2.evaluation.coco import COCOInstanceAP
from s4m_d2.evaluation.memory import masks_as_rle

__all__ = ["COCOInstanceAP", "CityscapesInstanceAP", "build_evaluator", "masks_as_rle"]
