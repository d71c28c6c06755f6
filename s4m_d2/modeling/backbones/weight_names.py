"""Renames weights of timm's models, of their authors and of Mask2Former to ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

BACKBONE = "backbone."
NET = f"{BACKBONE}net."
#: Layers of our backbones that no pre-trained model has: they keep their initial weights.
ADDED_LAYERS = (f"{BACKBONE}norms.", f"{BACKBONE}pyramid.")

# The original Swin merges patches at the end of a stage, timm at the start of the next.
_ORIGINAL_SWIN = "layers.0.downsample.reduction.weight"
_MERGING = re.compile(r"^layers\.(\d+)\.downsample\.")
_OUT_NORM = re.compile(r"^norm(\d)\.")  # Mask2Former's, one per stage
_COMPUTED = ("relative_position_index", "attn_mask")  # not in timm's files
_FIRST_LEVEL = 2  # stage 0 gives res2
_TIMM_SWIN = f"{NET}layers.0.blocks.0.attn.relative_position_bias_table"
_TIMM_MERGING = re.compile(rf"^{re.escape(NET)}layers\.(\d+)\.downsample\.")
_RES_NORM = re.compile(rf"^{re.escape(BACKBONE)}norms\.res(\d)\.")


def to_own_names(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Rename a file's weights to the names in a model with a timm backbone.

    Recognizes timm's names and those of the authors' files (Swin, DINOv2), with or without the
    prefix "backbone.", and Mask2Former's Swin. Other names are kept.

    Args:
        state: name → weight, as in a file.
        own: names of the model's weights.
    """
    state = dict(state)
    if not any(name.startswith(NET) for name in own):
        return state
    for prefix in (BACKBONE, ""):
        if prefix + _ORIGINAL_SWIN in state:
            state = _from_original_swin(state, prefix)
    return {_own_name(name, own): value for name, value in state.items()}


def _own_name(name: str, own: Collection[str]) -> str:
    inside = NET + name.removeprefix(BACKBONE)
    return inside if name not in own and inside in own else name


def _from_original_swin(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if name.endswith(_COMPUTED):
            continue
        if name.startswith(prefix):
            bare = name.removeprefix(prefix)
            bare = _MERGING.sub(lambda match: f"layers.{int(match[1]) + 1}.downsample.", bare)
            bare = _OUT_NORM.sub(lambda match: f"norms.res{int(match[1]) + _FIRST_LEVEL}.", bare)
            name = prefix + bare
        renamed[name] = value
    return renamed


def to_mask2former_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a model with timm's Swin to Mask2Former's names.

    Mask2Former's files also contain buffers, which it can compute. Names of other models are kept:
    Mask2Former has no other timm backbone.

    Args:
        state: name → weight of our model.
    """
    if _TIMM_SWIN not in state:
        return dict(state)
    return {_mask2former_name(name): value for name, value in state.items()}


def _mask2former_name(name: str) -> str:
    name = _RES_NORM.sub(lambda match: f"{BACKBONE}norm{int(match[1]) - _FIRST_LEVEL}.", name)
    name = _TIMM_MERGING.sub(
        lambda match: f"{BACKBONE}layers.{int(match[1]) - 1}.downsample.", name
    )
    return name.replace(NET, BACKBONE, 1) if name.startswith(NET) else name
