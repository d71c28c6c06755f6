"""Reads files of weights, from whatever trained them, without running code of theirs."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s4m_d2.engine.restricted_pickle import UnsafePickleError, load_arrays
from s4m_d2.errors import WeightsError

BRANCHES = {"student": "modelStudent.", "teacher": "modelTeacher."}

_ZIP_MAGIC = b"PK\x03\x04"
_TORCH_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_PICKLE_MAGIC = b"\x80"
_HEAD_BYTES = 64
_MODEL_ENTRIES = ("model", "model_state", "state_dict")  # the last two: pycls and many others
_FLAGS = ("matching_heuristics", "__author__")
_TORCH_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    OSError,
    LookupError,
    TypeError,
    ValueError,
    struct.error,
)
_TRUNCATED = ("truncated", "unexpected eof", "ran out of input", "unexpected end of data")
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
        state: name → tensor; prefixes of wrappers and branches are gone.
        by_suffix: names are those of a bare backbone, to be matched as suffixes of the model's.
        caffe2: names are Caffe2's (``res2_0_branch2a_w``).
    """

    state: dict[str, Tensor]
    by_suffix: bool = False
    caffe2: bool = False


def read_weight_file(path: str) -> dict[str, Any]:
    """The content of a ``.pth`` (PyTorch) or ``.pkl`` (NumPy arrays) file, told apart by content.

    Raises:
        WeightsError: the file is missing, ends early, is damaged, holds more than data, or is no
            file of weights.
    """
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise WeightsError(
            f"Weights '{path}': {found}. Give the path of a .pth or .pkl file "
            "(keys MODEL.WEIGHTS, S4M.TEACHER_WEIGHTS); relative paths start at the folder in "
            "which the command runs."
        )
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    content = _reader(path, head)(path)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"Weights '{path}': expected a dictionary of tensors, found a {type(content).__name__}."
        )
    return dict(content)


def _reader(path: str, head: bytes) -> Callable[[str], Any]:
    if not head:
        raise _truncated(path)
    if head.startswith(_ZIP_MAGIC):
        if not zipfile.is_zipfile(path):  # the table of contents is the end of the file
            raise _truncated(path)
        return _read_torch
    if head.startswith(_TORCH_LEGACY_MAGIC):
        return _read_torch
    if head.startswith(_PICKLE_MAGIC) or path.endswith(".pkl"):
        return _read_pickle
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"Weights '{path}' is a Git LFS pointer: run 'git lfs pull' first.")
    kind = "a web page, so its download failed" if head.lstrip().startswith(b"<") else "neither"
    raise WeightsError(
        f"Weights '{path}': expected a PyTorch .pth or a model-zoo .pkl file; this is {kind}. "
        "Download it again or give another file."
    )


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_ERRORS as error:
        if _ends_early(error):
            raise _truncated(path) from error
        names = re.findall(r"GLOBAL (\S+)", str(error))
        if names:
            raise WeightsError(
                f"Weights '{path}' hold Python objects ({names[0]}), which are refused because "
                "loading them may run code. Save a dictionary of tensors (model.state_dict())."
            ) from error
        raise WeightsError(
            f"Weights '{path}' are damaged or no PyTorch checkpoint ({_first_line(error)}). "
            "Download or copy the file again."
        ) from error


def _read_pickle(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return load_arrays(file)
    except UnsafePickleError as error:
        raise WeightsError(
            f"Weights '{path}' are refused: {error}. A model-zoo .pkl file holds a dictionary of "
            "NumPy arrays and nothing else; no code of the file was run."
        ) from error
    except (pickle.UnpicklingError, EOFError) as error:
        if _ends_early(error):
            raise _truncated(path) from error
        raise WeightsError(
            f"Weights '{path}' are no pickle of arrays ({_first_line(error)}). "
            "Download the file again or give another."
        ) from error


def _ends_early(error: Exception) -> bool:
    short_read = isinstance(error, EOFError | IndexError | struct.error)
    return short_read or any(word in str(error).lower() for word in _TRUNCATED)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _truncated(path: str) -> WeightsError:
    return WeightsError(
        f"Weights '{path}' end early ({os.path.getsize(path):,} bytes): the file is truncated. "
        "Download or copy it again; after an interrupted run, use an older checkpoint."
    )


def model_weights(content: Mapping[str, Any], branch: str, path: str) -> ModelWeights:
    """Find a model's weights in the content of a file.

    Args:
        content: what :func:`read_weight_file` returned.
        branch: "student" or "teacher": which of the two, where a file holds both (ours, and those
            with ``modelStudent.`` and ``modelTeacher.`` before their names). A file that holds one
            model serves for either.
        path: for messages.

    Raises:
        WeightsError: there are none, or an entry is no tensor.
    """
    state: Any = _teacher_entry(content) if branch == "teacher" else None
    if state is None:
        entries = (content[key] for key in _MODEL_ENTRIES if isinstance(content.get(key), Mapping))
        bare = {key: value for key, value in content.items() if key not in _FLAGS}
        state = next(entries, content.get("blobs", bare))
    state = _tensors(state, path)
    for prefix in ("module.", *_branch_prefixes(state, branch), "module."):
        state = _strip(state, prefix)
    by_suffix = bool(content.get("matching_heuristics")) or "model_state" in content
    if _TORCHVISION_RESNET in state:
        state, by_suffix = {_detectron2_name(k): v for k, v in state.items()}, True
    state = {k.replace(*_QUERIES_BEFORE_2022): v for k, v in state.items()}
    caffe2 = content.get("__author__") == "Caffe2" or _has_caffe2_names(state)
    if caffe2:
        state = {k: v for k, v in state.items() if not k.endswith("_momentum")}
    return ModelWeights(state, by_suffix or caffe2, caffe2)


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


def _branch_prefixes(state: Mapping[str, Tensor], branch: str) -> list[str]:
    """The prefix of the wanted branch, or else of the only one that the file holds, if any."""
    found = [p for p in BRANCHES.values() if any(_has_prefix(name, p) for name in state)]
    wanted = BRANCHES[branch]
    return [wanted] if wanted in found else found[:1]


def _has_prefix(name: str, prefix: str) -> bool:
    return name.removeprefix("module.").startswith(prefix)


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Without a wrapper's prefix if all names have it; of a branch, the names that have it."""
    stripped = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    if prefix in BRANCHES.values():
        return stripped
    return stripped if len(stripped) == len(state) else state


def _has_caffe2_names(state: Mapping[str, Tensor]) -> bool:
    """As in ``res2_0_branch2a_w``: words joined by underscores only."""
    return any(k.endswith("_w") for k in state) and not any("." in k for k in state)


def _detectron2_name(name: str) -> str:
    """Detectron2's name of a weight of torchvision's ResNet."""
    for pattern, replacement in _TORCHVISION_NAMES:
        name = pattern.sub(replacement, name)
    return name
