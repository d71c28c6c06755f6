"""Settings of how SAM computes."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from s4m_d2.errors import ConfigError, S4MError
from s4m_d2.sam.precision import AUTO, PRECISIONS


def sam_setting_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """Values of S4M.SAM that are out of range."""
    sam = cfg.S4M.SAM
    if sam.MAX_IMAGES < 0:
        yield ConfigError(
            f"S4M.SAM.MAX_IMAGES is {sam.MAX_IMAGES}; expected 1 or more, or 0 for as many as fit."
        )
    if sam.PRECISION not in (AUTO, *PRECISIONS):
        yield ConfigError(
            f"S4M.SAM.PRECISION is {sam.PRECISION!r}; choose one of "
            f"{', '.join((AUTO, *PRECISIONS))}."
        )
