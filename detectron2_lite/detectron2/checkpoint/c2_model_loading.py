"""Names of weights: from Caffe2's to ours, and from a backbone's to those inside a model."""

import logging
import os
import re

from torch import Tensor

logger = logging.getLogger(__name__)

_C2_RULES = (  # for ResNet backbones, applied in this order
    (r"^pred_([bw])$", r"linear_\1"),
    (r"_", "."),
    (r"\.b$", ".bias"),
    (r"\.w$", ".weight"),
    (r"[bg]n\.(s|gamma)$", "norm.weight"),
    (r"[bg]n\.(bias|beta)$", "norm.bias"),
    (r"bn\.(rm|running\.mean)$", "norm.running_mean"),
    (r"bn\.(riv|running\.var)$", "norm.running_var"),
    (r"^res\.conv1\.norm\.", "conv1.norm."),
    (r"^conv1\.", "stem.conv1."),
    (r"\.branch1\.", ".shortcut."),
    (r"\.branch2a\.", ".conv1."),
    (r"\.branch2b\.", ".conv2."),
    (r"\.branch2c\.", ".conv3."),
)


def convert_c2_detectron_names(
    weights: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename a Caffe2 ResNet's weights: res2_0_branch2a_bn_s becomes res2.0.conv1.norm.weight.

    Returns the weights under their new names, and new name -> Caffe2 name.
    """
    names = {}
    for original in sorted(weights):
        name = original
        for pattern, replacement in _C2_RULES:
            name = re.sub(pattern, replacement, name)
        assert name not in names, f"two Caffe2 names became {name}"
        names[name] = original
    return {name: weights[original] for name, original in names.items()}, names


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
    taken: dict[str, str] = {}
    for name in sorted(model_state_dict):
        words = name.split(".")
        suffixes = (".".join(words[i:]) for i in range(len(words)))
        key = next((suffix for suffix in suffixes if suffix in ckpt_state_dict), None)
        if key is None:
            continue
        shape, wanted = tuple(ckpt_state_dict[key].shape), tuple(model_state_dict[name].shape)
        if shape != wanted:
            logger.warning("'%s' %s is not loaded into '%s' %s", key, shape, name, wanted)
            continue
        if key in taken:
            raise ValueError(
                "Cannot match one checkpoint key to multiple keys in the model: "
                f"'{key}' matches '{taken[key]}' and '{name}'."
            )
        taken[key] = name
    if not taken:
        logger.warning("No weights in checkpoint matched with model.")
        return ckpt_state_dict
    prefix = os.path.commonprefix(list(taken.values()))
    logger.info("%d of %d weights match the model's %s*", len(taken), len(ckpt_state_dict), prefix)
    return {taken.get(key, key): value for key, value in ckpt_state_dict.items()}
