"""Finds a model's weights in a file's content and gives them the names of today's Mask2Former."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s4m_d2.errors import WeightsError

#: The two models of a semi-supervised run, and the prefixes of their names in the checkpoints of
#: Guided Distillation and S4M.
BRANCHES = {"student": "modelStudent.", "teacher": "modelTeacher."}

_WRAPPER = "module."  # DistributedDataParallel's
_MODEL_ENTRIES = ("model", "model_state", "state_dict")  # the last two: pycls and many others
_FLAGS = ("matching_heuristics", "__author__")
_HEAD = "sem_seg_head."
_PIXEL_DECODER = f"{_HEAD}pixel_decoder."
_PREDICTOR = f"{_HEAD}predictor."
_QUERIES_BEFORE_2022 = ("static_query", "query_feat")  # Mask2Former renamed its queries
_TORCHVISION_RESNET = "layer1.0.conv1.weight"
_TORCHVISION_NAMES = (
    (re.compile(r"^(conv1|bn1)\."), r"stem.\1."),
    (re.compile(r"^layer(\d)\."), lambda match: f"res{int(match[1]) + 1}."),
    (re.compile(r"\bbn(\d)\."), r"conv\1.norm."),
    (re.compile(r"\bdownsample\.0\."), "shortcut."),
    (re.compile(r"\bdownsample\.1\."), "shortcut.norm."),
)


@dataclass(frozen=True)
class ModelWeights:
    """The weights of one model, as a file names them.

    Attributes:
        state: name → tensor; prefixes of wrappers and branches are gone, old names are replaced.
        branch: which of the two models it is, "student" or "teacher"; None if the file does not
            say, because it holds one model only.
        by_suffix: names are those of a bare backbone, to be matched as suffixes of the model's.
        caffe2: names are Caffe2's (``res2_0_branch2a_w``).
    """

    state: dict[str, Tensor]
    branch: str | None = None
    by_suffix: bool = False
    caffe2: bool = False


def model_weights(content: Mapping[str, Any], branch: str, path: str) -> ModelWeights:
    """Find a model's weights in the content of a file.

    Args:
        content: what :func:`~s4m_d2.engine.checkpointing.weight_files.read_weight_file` returned.
        branch: "student" or "teacher": which of the two, where a file holds both (ours, and those
            with ``modelStudent.`` and ``modelTeacher.`` before their names). A file that holds one
            model serves for either; the result says which it is.
        path: for messages.

    Raises:
        WeightsError: there are none, or an entry is no tensor.
    """
    teacher = _teacher_entry(content)
    if teacher is not None and branch == "teacher":
        state: Any = teacher
    else:
        entries = (content[key] for key in _MODEL_ENTRIES if isinstance(content.get(key), Mapping))
        bare = {key: value for key, value in content.items() if key not in _FLAGS}
        state = next(entries, content.get("blobs", bare))
    state = _unwrapped(_tensors(state, path))
    state, found = _of_branch(state, branch)
    if found is None and teacher is not None:
        found = branch
    by_suffix = bool(content.get("matching_heuristics")) or "model_state" in content
    if _TORCHVISION_RESNET in state:
        state, by_suffix = {_detectron2_name(k): v for k, v in state.items()}, True
    caffe2 = content.get("__author__") == "Caffe2" or _has_caffe2_names(state)
    if caffe2:
        state = {k: v for k, v in state.items() if not k.endswith("_momentum")}
    return ModelWeights(_current_names(state), found, by_suffix or caffe2, caffe2)


def _teacher_entry(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The EMA teacher in one of our files: an entry of its own, or the state of its hook."""
    state: Any = content.get("teacher")
    if state is None:
        state = content
        for key in ("trainer", "hooks", "EMATeacherHook", "teacher"):
            state = state.get(key) if isinstance(state, Mapping) else None
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        return state["model"]
    return state


def _tensors(state: Any, path: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(
            f"Weights '{path}' hold no model: expected a dictionary of tensors, or one under "
            f"{', '.join(_MODEL_ENTRIES)}."
        )
    tensors = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray | np.generic):
            value = torch.from_numpy(np.array(value))
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"Weights '{path}': expected names and tensors, found {name!r} with a "
                f"{type(value).__name__}. The known entries of a checkpoint with more than weights "
                f"are {', '.join(_MODEL_ENTRIES)}."
            )
        tensors[name] = value
    return tensors


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without DDP's prefix, if all names have it."""
    if not all(name.startswith(_WRAPPER) for name in state):
        return state
    return {name.removeprefix(_WRAPPER): value for name, value in state.items()}


def _of_branch(state: dict[str, Tensor], branch: str) -> tuple[dict[str, Tensor], str | None]:
    """The weights of one of two models, and which it is.

    If the file has only the other one, that one. Names with neither prefix stay as they are; they
    are the student in a file that has prefixes for the teacher alone.
    """
    models = {
        name: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        for name, prefix in BRANCHES.items()
    }
    rest = {k: v for k, v in state.items() if not k.startswith(tuple(BRANCHES.values()))}
    if models[branch]:
        return rest | _unwrapped(models[branch]), branch
    for name, model in models.items():
        if model:
            return _unwrapped(model) | rest, branch if model.keys() <= rest.keys() else name
    return state, None


def _current_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mask2Former's names of today, for the files of its earlier versions.

    The learnable queries had another name, and the pixel decoder stood directly under the head.
    Mask2Former itself moves the pixel decoder when a file does not state a version, which files
    that were converted and saved again do not: there the decoder stands one level too deep.
    """
    names = {name: name.replace(*_QUERIES_BEFORE_2022) for name in state}
    flat = f"{_PREDICTOR}query_embed.weight" in state and not any(
        name.startswith(_PIXEL_DECODER) for name in state
    )
    for name, current in names.items():
        if flat and name.startswith(_HEAD) and not name.startswith(_PREDICTOR):
            names[name] = _PIXEL_DECODER + name.removeprefix(_HEAD)
        elif name.startswith(f"{_PIXEL_DECODER}pixel_decoder."):
            names[name] = current.replace("pixel_decoder.", "", 1)
    return {names[name]: value for name, value in state.items()}


def _has_caffe2_names(state: Mapping[str, Tensor]) -> bool:
    """As in ``res2_0_branch2a_w``: words joined by underscores only."""
    return any(k.endswith("_w") for k in state) and not any("." in k for k in state)


def _detectron2_name(name: str) -> str:
    """Detectron2's name of a weight of torchvision's ResNet."""
    for pattern, replacement in _TORCHVISION_NAMES:
        name = pattern.sub(replacement, name)
    return name
