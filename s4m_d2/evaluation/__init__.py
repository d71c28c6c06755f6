"""Mask AP, by the measure that the data set comes with."""

from s4m_d2.evaluation.build import build_evaluator
from s4m_d2.evaluation.cityscapes import CityscapesInstanceAP

__all__ = ["CityscapesInstanceAP", "build_evaluator"]
