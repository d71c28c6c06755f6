"""Mask AP by COCO's or Cityscapes' measure, and the quality of pseudo-labels."""

from s4m_d2.evaluation.average_precision import build_evaluator, masks_as_rle
from s4m_d2.evaluation.pseudo_label_quality import PseudoLabelQuality

__all__ = ["PseudoLabelQuality", "build_evaluator", "masks_as_rle"]
