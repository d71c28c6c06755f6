"""SEPL: CAM pseudo-labels enhanced by SAM's masks (arXiv 2305.05803)."""

from s4m_d2.sepl.enhancement import (
    BACKGROUND,
    VOID,
    MaskSelection,
    enhance,
    merge_masks,
    select_masks,
)

__all__ = ["BACKGROUND", "VOID", "MaskSelection", "enhance", "merge_masks", "select_masks"]
