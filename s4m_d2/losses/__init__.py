"""Losses. They import no models; only their ``from_config`` reads a config."""

from s4m_d2.losses.criterion import SetCriterion
from s4m_d2.losses.matcher import HungarianMatcher
from s4m_d2.losses.structural_distillation import (
    DISTILLATION_REGISTRY,
    StructuralDistillation,
    build_distillation,
)

__all__ = [
    "DISTILLATION_REGISTRY",
    "HungarianMatcher",
    "SetCriterion",
    "StructuralDistillation",
    "build_distillation",
]
