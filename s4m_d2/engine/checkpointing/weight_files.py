"""Reads files of weights, from whatever trained them, without running code of theirs."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

from s4m_d2.errors import WeightsError
from s4m_d2.files import TENSOR_FILE_ERRORS, refused_object
from s4m_d2.pretrained import PYPI, read_pypi_weights
from s4m_d2.restricted_pickle import UnsafePickleError, load_arrays

_ZIP_MAGIC = b"PK\x03\x04"
_TORCH_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_PICKLE_MAGIC = b"\x80"
_SAFETENSORS_LENGTH = struct.Struct("<Q")  # the length of the header, which follows
_SAFETENSORS_START = slice(_SAFETENSORS_LENGTH.size, _SAFETENSORS_LENGTH.size + 2)
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, as in the format's description
_HEAD_BYTES = 64
_TRUNCATED = ("truncated", "unexpected eof", "ran out of input", "end of data", "end of frame")


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
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    content = _reader(path, head, mapped)(path)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"Weights '{path}': expected a dictionary of tensors, found a {type(content).__name__}."
        )
    return dict(content)


def is_archive(path: str) -> bool:
    """Whether a file ends as the archives of ``torch.save`` do."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it has the end of one, which makes no sense: its reader will say
        return True


def _reader(path: str, head: bytes, mapped: bool) -> Callable[[str], Any]:
    if not head:
        raise _truncated(path)
    if head.startswith(_ZIP_MAGIC):
        if not is_archive(path):  # the table of contents is the end of the file
            raise _truncated(path)
        return functools.partial(_read_torch, mapped=mapped)
    if head.startswith(_TORCH_LEGACY_MAGIC):
        return _read_torch
    if head[_SAFETENSORS_START] == b'{"' or path.endswith(".safetensors"):
        return _read_safetensors
    if head.startswith(_PICKLE_MAGIC) or path.endswith(".pkl"):
        return _read_pickle
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"Weights '{path}' is a Git LFS pointer: run 'git lfs pull' first.")
    kind = "a web page, so its download failed" if head.lstrip().startswith(b"<") else "neither"
    raise WeightsError(
        f"Weights '{path}': expected a PyTorch .pth, a model-zoo .pkl or a .safetensors file; this "
        f"is {kind}. Download it again or give another file."
    )


def _read_torch(path: str, mapped: bool = False) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except TENSOR_FILE_ERRORS as error:
        if _ends_early(error):
            raise _truncated(path) from error
        if refused := refused_object(error):
            raise WeightsError(
                f"Weights '{path}' hold Python objects ({refused}), which are refused because "
                "loading them may run code. Save a dictionary of tensors (model.state_dict())."
            ) from error
        raise WeightsError(
            f"Weights '{path}' are damaged or no PyTorch checkpoint ({_first_line(error)}). "
            "Download or copy the file again."
        ) from error


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(
            f"Weights '{path}' need the package that reads them: pip install safetensors."
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        if _is_short_safetensors(path):
            raise _truncated(path) from error
        raise WeightsError(
            f"Weights '{path}' are damaged or no safetensors file ({_first_line(error)}). "
            "Download or copy the file again."
        ) from error


def _is_short_safetensors(path: str) -> bool:
    """Whether the file has fewer bytes than its header says, or not even all of its header."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(_SAFETENSORS_LENGTH.size)
        if len(start) < _SAFETENSORS_LENGTH.size:
            return True
        (length,) = _SAFETENSORS_LENGTH.unpack(start)
        if length > _MAX_SAFETENSORS_HEADER:
            return False
        if size < len(start) + length:
            return True
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for entry in header.values() if "dtype" in entry]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False
    return size < len(start) + length + max(ends, default=0)


def _read_pickle(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return load_arrays(file)
    except UnsafePickleError as error:
        raise WeightsError(
            f"Weights '{path}' are refused: {error}. A model-zoo .pkl file holds a dictionary of "
            "NumPy arrays and nothing else; no code of the file was run. Download it from a source "
            "that you trust."
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
