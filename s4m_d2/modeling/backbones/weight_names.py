"""Renames weights of timm's models, of their authors and of Mask2Former to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

BACKBONE = "backbone."
NET = f"{BACKBONE}net."
#: Layers of our backbones that no pre-trained model has: they keep their initial weights.
ADDED_LAYERS = (f"{BACKBONE}norms.", f"{BACKBONE}pyramid.")

_ORIGINAL_SWIN = "layers.0.downsample.reduction.weight"
_COMPUTED = ("relative_position_index", "attn_mask")  # not in timm's files
_TIMM_SWIN = f"{NET}layers.0.blocks.0.attn.relative_position_bias_table"
# Patterns and replacements. The original Swin merges patches at the end of a stage, timm at the
# start of the next; Mask2Former has a norm per stage, and stage 0 gives res2.
Table = dict[str, str | Callable[[re.Match], str]]
_FROM_ORIGINAL_SWIN: Table = {
    r"^(backbone\.)?layers\.(\d+)\.downsample\.": lambda m: (
        f"{m[1] or ''}layers.{int(m[2]) + 1}.downsample."
    ),
    r"^(backbone\.)?norm(\d)\.": lambda m: f"{m[1] or ''}norms.res{int(m[2]) + 2}.",
}
_TO_MASK2FORMER: Table = {
    r"^backbone\.norms\.res(\d)\.": lambda m: f"backbone.norm{int(m[1]) - 2}.",
    r"^backbone\.net\.layers\.(\d+)\.downsample\.": lambda m: (
        f"backbone.layers.{int(m[1]) - 1}.downsample."
    ),
    r"^backbone\.net\.": "backbone.",
}


def renamed(name: str, table: Table) -> str:
    """Apply all replacements, one after another."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def to_own_names(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Rename a file's weights to the names in a model with a timm backbone, whose are ``own``.

    Recognizes timm's names and those of the authors' files (Swin, DINOv2), with or without the
    prefix "backbone.", and Mask2Former's Swin. Other names are kept.
    """
    if not any(name.startswith(NET) for name in own):
        return dict(state)
    if f"{BACKBONE}{_ORIGINAL_SWIN}" in state or _ORIGINAL_SWIN in state:
        state = {
            renamed(name, _FROM_ORIGINAL_SWIN): value
            for name, value in state.items()
            if not name.endswith(_COMPUTED)
        }
    inside = {name: NET + name.removeprefix(BACKBONE) for name in state}
    moved = {name: new for name, new in inside.items() if name not in own and new in own}
    return {moved.get(name, name): value for name, value in state.items()}


def to_mask2former_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a model with timm's Swin to Mask2Former's names.

    Mask2Former's files also contain buffers, which it can compute. Names of other models are kept:
    Mask2Former has no other timm backbone.
    """
    if _TIMM_SWIN not in state:
        return dict(state)
    return {renamed(name, _TO_MASK2FORMER): value for name, value in state.items()}
