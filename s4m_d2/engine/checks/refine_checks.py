"""Settings of the refiners that have settings of their own."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from s4m_d2.errors import ConfigError, S4MError

_SHARES = ("O_S_THRESH", "O_P_THRESH")
_SCORES = ("PRED_IOU_THRESH", "STABILITY_SCORE_THRESH", "BOX_NMS_THRESH")


def refine_setting_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """Values of S4M.REFINE.SEPL that are out of range."""
    sepl = cfg.S4M.REFINE.SEPL
    rules = [
        *((key, 0 <= sepl[key] <= 1, "a share from 0 to 1 (1: never exceeded)") for key in _SHARES),
        *((key, 0 <= sepl[key] <= 1, "a number from 0 to 1") for key in _SCORES),
        ("POINTS_PER_SIDE", sepl.POINTS_PER_SIDE >= 1, "1 or more"),
        ("MIN_MASK_REGION_AREA", sepl.MIN_MASK_REGION_AREA >= 0, "0 or more, in pixels"),
    ]
    for key, is_right, expected in rules:
        if not is_right:
            yield ConfigError(f"S4M.REFINE.SEPL.{key} is {sepl[key]!r}; expected {expected}.")
