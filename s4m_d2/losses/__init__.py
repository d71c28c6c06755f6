"""Losses: leaves that know neither models nor configs beyond their own ``from_config``."""

from s4m_d2.losses.criterion import SetCriterion
from s4m_d2.losses.matcher import HungarianMatcher

__all__ = ["HungarianMatcher", "SetCriterion"]
