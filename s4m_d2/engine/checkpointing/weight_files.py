"""Reads files of weights, from whatever trained them, without running code of theirs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from s4m_d2.errors import WeightsError
from s4m_d2.files import TENSOR_FILE_ERRORS, refused_object
from s4m_d2.pretrained import PYPI, read_pypi_weights
from s4m_d2.restricted_pickle import load_arrays

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_SAFETENSORS_HEADER = slice(8, 10), b'{"'  # after its length
_HEAD_BYTES = 64
_NO_WEIGHTS = {  # first bytes → what the file is
    b"version https://git-lfs": "it is a Git LFS pointer: run 'git lfs pull' first",
    b"<": "it is a web page: the download failed",
}


def read_weight_file(path: str, *, mapped: bool = False) -> dict[str, Any]:
    """The content of a ``.pth`` (PyTorch), ``.pkl`` (NumPy arrays) or ``.safetensors`` file.

    The three are told apart by their content. Tensors are on the CPU.

    Args:
        path: of the file, or "pypi://" and a name of :data:`s4m_d2.pretrained.PACKAGES`.
        mapped: for a look at names and shapes: a ``.pth``'s tensors stay in the file until their
            values are used (but for the oldest format of PyTorch's).

    Raises:
        WeightsError: the file is missing, ends early, is damaged, holds more than data, or is no
            file of weights.
    """
    if path.startswith(PYPI):
        return read_pypi_weights(path)
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise WeightsError(
            f"Weights '{path}': {found}. Give the path of a .pth, .pkl or .safetensors "
            "file (keys MODEL.WEIGHTS, S4M.TEACHER_WEIGHTS); relative paths start at the folder in "
            "which the command runs."
        )
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        content = _read(path, head, mapped)
    except TENSOR_FILE_ERRORS as error:
        if name := refused_object(error):
            raise WeightsError(
                f"Weights '{path}' hold Python objects ({name}), which are refused because "
                "loading them may run code. Save a dictionary of tensors (model.state_dict())."
            ) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        start = head.lstrip()
        reason = next((v for k, v in _NO_WEIGHTS.items() if start.startswith(k)), first_line)
        raise WeightsError(
            f"Weights '{path}' are truncated, damaged or none ({reason}). Download or copy the "
            "file again; expected a .pth of PyTorch's, a .pkl of arrays or .safetensors."
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"Weights '{path}': expected a dictionary of tensors, found a {type(content).__name__}."
        )
    return dict(content)


def _read(path: str, head: bytes, mapped: bool) -> Any:
    if head.startswith((_ZIP, _TORCH_LEGACY)):
        mapped = mapped and head.startswith(_ZIP)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    place, start = _SAFETENSORS_HEADER
    if head[place] == start or path.endswith(".safetensors"):
        return _read_safetensors(path)
    with open(path, "rb") as file:
        return load_arrays(file)


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("its reader is missing: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
