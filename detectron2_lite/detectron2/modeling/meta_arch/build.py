"""Whole models by name."""

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = "Whole models: called with the config, return an nn.Module."


def build_model(cfg: CfgNode) -> nn.Module:
    """Build `cfg.MODEL.META_ARCHITECTURE` on `cfg.MODEL.DEVICE`; no weights are loaded."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    model.to(torch.device(cfg.MODEL.DEVICE))
    return model
