"""How programs lay out files of SAM and its descendants, and which model a state dict is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_ENCODER = "image_encoder."  # in a name of each of these models; what precedes it is a wrapper's
_VIT_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_VIT_GRID = (1, 64, 64)
_HIERA_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_HIERA_DEPTHS = {12: "hiera_t", 16: "hiera_s", 24: "hiera_b+", 48: "hiera_l"}


def unwrap(content: Any) -> Any:
    """The state dict in the content of a file, under SAM's own names.

    It may be the only one of a mapping, as SAM 2 (``model``), Lightning (``state_dict``) and
    micro-sam (``model_state``) save it, and its names may begin with those of modules around the
    SAM (``module.``, ``sam.``); entries without that beginning are not the SAM's and are left out.

    Returns:
        ``content`` itself where it holds nothing like that.
    """
    if not isinstance(content, Mapping):
        return content
    inner = [v for v in content.values() if isinstance(v, Mapping) and _beginnings(v)]
    state = inner[0] if len(inner) == 1 else content
    beginnings = _beginnings(state)
    if len(beginnings) != 1:
        return state
    (start,) = beginnings
    return {str(n).removeprefix(start): v for n, v in state.items() if str(n).startswith(start)}


def _beginnings(state: Mapping) -> set[str]:
    names = (name for name in state if isinstance(name, str))
    return {name.partition(_ENCODER)[0] for name in names if _ENCODER in name}


def recognize(state: Mapping[str, Tensor]) -> str:
    """The model that a state dict is of: a value of S4M.SAM.MODEL_TYPE, HQ-SAM, MobileSAM or ""."""
    if any(name.endswith("hf_token.weight") for name in state):
        return "HQ-SAM"
    if any(name.startswith("image_encoder.patch_embed.seq.") for name in state):  # TinyViT's
        return "MobileSAM"
    blocks = {match[1] for match in map(_HIERA_BLOCK.match, state) if match}
    if blocks:
        return _HIERA_DEPTHS.get(len(blocks), "")
    position = state.get("image_encoder.pos_embed")
    if position is None or position.shape[:-1] != _VIT_GRID:
        return ""
    return _VIT_WIDTHS.get(position.shape[-1], "")
