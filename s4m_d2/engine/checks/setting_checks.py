"""Settings of single features that are out of range, each checked beside its feature."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from s4m_d2.engine.checks.refine_checks import refine_setting_errors
from s4m_d2.engine.checks.sam_checks import sam_setting_errors
from s4m_d2.engine.figures.figure_set import figure_setting_errors
from s4m_d2.engine.labeling.quality import quality_setting_errors
from s4m_d2.errors import S4MError

CHECKS = (
    figure_setting_errors,
    quality_setting_errors,
    refine_setting_errors,
    sam_setting_errors,
)


def setting_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """All of them, from whatever feature."""
    for check in CHECKS:
        yield from check(cfg)
