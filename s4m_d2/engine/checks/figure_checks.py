"""Settings of the figures that training draws."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from s4m_d2.engine.figures.figure_set import FIGURES
from s4m_d2.errors import ConfigError, S4MError


def figure_setting_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """What is wrong with S4M.FIGURES."""
    settings = cfg.S4M.FIGURES
    for key, least in (("PERIOD", 0), ("IMAGES", 1)):
        if settings[key] < least:
            yield ConfigError(f"S4M.FIGURES.{key} is {settings[key]}; expected {least} or more.")
    unknown = [name for name in settings.WHAT if name not in FIGURES]
    if unknown:
        yield ConfigError(f"S4M.FIGURES.WHAT has {unknown[0]!r}; choose from {', '.join(FIGURES)}.")
