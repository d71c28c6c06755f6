"""Backbones, and the registries of everything a model is built of."""

from detectron2.layers import ShapeSpec

from .backbone import BACKBONE_REGISTRY, Backbone, ResNet, build_backbone, build_resnet_backbone
from .meta_arch import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, build_model, build_sem_seg_head

# fmt: off
__all__ = [
    "BACKBONE_REGISTRY", "META_ARCH_REGISTRY", "SEM_SEG_HEADS_REGISTRY", "Backbone", "ResNet",
    "ShapeSpec", "build_backbone", "build_model", "build_resnet_backbone", "build_sem_seg_head",
]
