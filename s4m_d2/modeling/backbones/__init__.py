"""Backbones beside Detectron2's; importing this registers them, without importing timm."""

from s4m_d2.modeling.backbones.feature_pyramid import ChannelNorm, SimpleFeaturePyramid
from s4m_d2.modeling.backbones.timm_backbone import TimmBackbone, build_timm_backbone

__all__ = ["ChannelNorm", "SimpleFeaturePyramid", "TimmBackbone", "build_timm_backbone"]
