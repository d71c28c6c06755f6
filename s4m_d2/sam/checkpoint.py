"""Reads SAM weights, with errors that name the file's model and where to get the right file."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from s4m_d2.errors import WeightsError, first_names, require
from s4m_d2.pretrained import read_weight_file, renamed

# By S4M.SAM.BACKEND and MODEL_TYPE: file names, the newest first.
PUBLISHED_WEIGHTS: dict[str, dict[str, tuple[str, ...]]] = {
    "segment_anything": {
        "vit_b": ("sam_vit_b_01ec64.pth",),
        "vit_l": ("sam_vit_l_0b3195.pth",),
        "vit_h": ("sam_vit_h_4b8939.pth",),
        "vit_t": ("mobile_sam.pt",),
    },
    "sam2": {
        "hiera_t": ("sam2.1_hiera_tiny.pt", "sam2_hiera_tiny.pt"),
        "hiera_s": ("sam2.1_hiera_small.pt", "sam2_hiera_small.pt"),
        "hiera_b+": ("sam2.1_hiera_base_plus.pt", "sam2_hiera_base_plus.pt"),
        "hiera_l": ("sam2.1_hiera_large.pt", "sam2_hiera_large.pt"),
    },
}
PUBLISHED_AT = {  # by model, or else by backend
    "vit_t": "https://github.com/ChaoningZhang/MobileSAM/tree/master/weights",
    "segment_anything": "https://github.com/facebookresearch/segment-anything#model-checkpoints",
    "sam2": "https://github.com/facebookresearch/sam2#download-checkpoints",
}
MOST_NAMED = 3  # entries in an error message
_ENCODER = "image_encoder."  # in names of all these models; a wrapper's prefix precedes it
_VIT_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_VIT_GRID = (1, 64, 64)
_HIERA_BLOCK = re.compile(r"image_encoder\.trunk\.blocks\.(\d+)\.")
_HIERA_DEPTHS = {12: "hiera_t", 16: "hiera_s", 24: "hiera_b+", 48: "hiera_l"}


def load_sam(
    build: Callable[[], nn.Module],
    path: str | Path,
    model: str,
    ignored: tuple[str, ...] = (),
    names: Mapping[str, str] = MappingProxyType({}),
) -> nn.Module:
    """Build a SAM with the weights of a file, which may be wrapped as by other programs.

    Only tensors are read. Under ``torch.device("meta")`` the file is checked, and the model has no
    values.

    Args:
        build: makes the model, without weights.
        path: of the file, see :func:`read_weight_file`.
        model: the model's name in messages, such as ``vit_b``.
        ignored: prefixes of parameters in the file that the model does not have.
        names: table of :func:`renamed`, from names in the file to the model's.

    Raises:
        WeightsError: the file is missing, unreadable or of another model.
    """
    subject, remedy = f"SAM weights for {model}: '{path}'", _remedy(model)
    content = read_weight_file(
        str(path), mapped=True, what=f"SAM weights for {model}:", remedy=remedy
    )
    read = _unwrap(content)
    if not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in read.items()):
        found = first_names(list(map(str, read)), MOST_NAMED)
        raise WeightsError(f"{subject} holds entries {found}; expected tensors alone. {remedy}")
    state = {renamed(n, names): v for n, v in read.items() if not n.startswith(ignored)}
    with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced
        sam = build()
    if problems := _mismatches(state, sam.state_dict()):
        found, settings = _recognize(state)
        if found and found != model:
            raise WeightsError(f"{subject} is of {found}: set {settings}. For {model}: {remedy}")
        raise WeightsError(
            f"{subject} is of another model ({len(state)} entries, expected "
            f"{len(sam.state_dict())}): {first_names(problems, MOST_NAMED, '; ')}. {remedy}"
        )
    if not next(sam.parameters()).is_meta:
        sam.load_state_dict(state)
    return sam


def check_model_type(backend: str, model: str) -> None:
    """ConfigError: ``model`` is none of the published ones of the backend."""
    names = PUBLISHED_WEIGHTS[backend]
    expected = f"one of {', '.join(names)}, which S4M.SAM.BACKEND {backend} offers"
    require("S4M.SAM.MODEL_TYPE", model, model in names, expected)


def _remedy(model: str) -> str:
    """Where to get the weights of a value of S4M.SAM.MODEL_TYPE, or of a packaged model."""
    for backend, models in PUBLISHED_WEIGHTS.items():
        if model in models:
            files, place = models[model], PUBLISHED_AT.get(model, PUBLISHED_AT[backend])
            return f"Download {' or '.join(files)} from {place} and set S4M.SAM.CHECKPOINT to it."
    return 'Set S4M.SAM.CHECKPOINT to "" for the packaged weights.'


def _mismatches(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    has, needs = ({name: tuple(v.shape) for name, v in of.items()} for of in (state, expected))
    return [
        f"{name} is {has.get(name, 'absent')} instead of {needs.get(name, 'absent')}"
        for name in needs | has
        if has.get(name) != needs.get(name)
    ]


def _unwrap(content: Mapping) -> Mapping:
    """The state dict in a file's content.

    It may be an entry, as saved by SAM 2 (``model``), Lightning (``state_dict``) and micro-sam
    (``model_state``). Prefixes of a wrapper (``module.``, ``sam.``) are removed from its names, and
    entries without the prefix.
    """
    inner = [v for v in content.values() if isinstance(v, Mapping) and _prefixes(v)]
    state = inner[0] if len(inner) == 1 else content
    prefixes = _prefixes(state)
    if len(prefixes) != 1:
        return state
    (prefix,) = prefixes
    return {str(n).removeprefix(prefix): v for n, v in state.items() if str(n).startswith(prefix)}


def _prefixes(state: Mapping) -> set[str]:
    names = (name for name in state if isinstance(name, str))
    return {name.partition(_ENCODER)[0] for name in names if _ENCODER in name}


def _recognize(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """Model of a state dict and the settings that use it; ("", "") if it is unknown."""
    if any(name.endswith("hf_token.weight") for name in state):
        return "HQ-SAM", "S4M.SAM.BACKEND transformers, S4M.SAM.CHECKPOINT to its name there"
    blocks = {match[1] for match in map(_HIERA_BLOCK.match, state) if match}
    position = state.get("image_encoder.pos_embed")
    if any(name.startswith("image_encoder.patch_embed.seq.") for name in state):  # TinyViT's
        model = "vit_t"
    elif position is not None and position.shape[:-1] == _VIT_GRID:
        model = _VIT_WIDTHS.get(position.shape[-1], "")
    else:
        model = _HIERA_DEPTHS.get(len(blocks), "")
    backend = "sam2" if blocks else "segment_anything"
    return model, f"S4M.SAM.BACKEND {backend} S4M.SAM.MODEL_TYPE {model}"
