"""Names of weights: from Caffe2's to ours, and from a backbone's to those inside a model."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

from torch import Tensor

logger = logging.getLogger(__name__)

# Applied in this order; it covers ResNet backbones with fused, plain and group normalization.
_C2_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^pred_([bw])$", r"linear_\1"),
        (r"_", "."),
        (r"\.b$", ".bias"),
        (r"\.w$", ".weight"),
        (r"bn\.(?:s|gamma)$", "norm.weight"),
        (r"bn\.(?:bias|beta)$", "norm.bias"),
        (r"bn\.(?:rm|running\.mean)$", "norm.running_mean"),
        (r"bn\.(?:riv|running\.var)$", "norm.running_var"),
        (r"gn\.s$", "norm.weight"),
        (r"gn\.bias$", "norm.bias"),
        (r"^res\.conv1\.norm\.", "conv1.norm."),
        (r"^conv1\.", "stem.conv1."),
        (r"\.branch1\.", ".shortcut."),
        (r"\.branch2a\.", ".conv1."),
        (r"\.branch2b\.", ".conv2."),
        (r"\.branch2c\.", ".conv3."),
    )
]


def convert_basic_c2_names(original_keys: list[str]) -> list[str]:
    """Rename a Caffe2 ResNet's weights: res2_0_branch2a_bn_s is res2.0.conv1.norm.weight."""
    renamed = []
    for key in original_keys:
        for pattern, replacement in _C2_RULES:
            key = pattern.sub(replacement, key)
        renamed.append(key)
    return renamed


def convert_c2_detectron_names(
    weights: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights under their new names, and new name -> Caffe2 name."""
    original = sorted(weights)
    renamed = convert_basic_c2_names(original)
    assert len(set(renamed)) == len(renamed), "two Caffe2 names became one"
    names = dict(zip(renamed, original, strict=True))
    return {new: weights[old] for new, old in names.items()}, names


def align_and_update_state_dicts(
    model_state_dict: dict[str, Tensor],
    ckpt_state_dict: dict[str, Tensor],
    c2_conversion: bool = True,
) -> dict[str, Tensor]:
    """Rename a checkpoint's tensors to those names of the model that end in theirs.

    The model's "backbone.res2.0.conv1.weight" takes the checkpoint's longest whole-word suffix of
    it ("res2.0.conv1.weight" before "conv1.weight"). A match with another shape is logged and
    left out. What matches nothing keeps its name. Raises ValueError if one tensor of the
    checkpoint matches two of the model.
    """
    if c2_conversion:
        ckpt_state_dict, _ = convert_c2_detectron_names(ckpt_state_dict)
    aligned: dict[str, Tensor] = {}
    taken: dict[str, str] = {}
    for model_key in sorted(model_state_dict):
        key = next((k for k in _suffixes(model_key) if k in ckpt_state_dict), None)
        if key is None:
            continue
        value, shape = ckpt_state_dict[key], model_state_dict[model_key].shape
        if value.shape != shape:
            logger.warning(
                "'%s' has shape %s in the checkpoint and '%s' has %s in the model: not loaded.",
                *(key, tuple(value.shape), model_key, tuple(shape)),
            )
            continue
        if key in taken:
            raise ValueError(
                "Cannot match one checkpoint key to multiple keys in the model: "
                f"'{key}' matches '{taken[key]}' and '{model_key}'."
            )
        taken[key] = model_key
        aligned[model_key] = value
    if not aligned:
        logger.warning("No weights in checkpoint matched with model.")
        return ckpt_state_dict
    logger.info(
        "%d of the checkpoint's %d weights match the model's '%s*'",
        *(len(aligned), len(ckpt_state_dict), os.path.commonprefix(list(aligned))),
    )
    return aligned | {key: v for key, v in ckpt_state_dict.items() if key not in taken}


def _suffixes(name: str) -> Iterator[str]:
    """The name, then the name without its first word, and so on ("a.b.c", "b.c", "c")."""
    yield name
    while "." in name:
        _, name = name.split(".", 1)
        yield name
