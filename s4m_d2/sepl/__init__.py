"""SEPL: CAM pseudo-labels enhanced by SAM's masks (arXiv 2305.05803)."""

from s4m_d2.sepl.rule import BACKGROUND, VOID, enhance

__all__ = ["BACKGROUND", "VOID", "enhance"]
