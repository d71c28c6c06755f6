"""Weight files, read without running their code, and the checkpoints of a stage."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from s4m_d2.engine.checks.findings import attempt
from s4m_d2.errors import S4MError, WeightsError
from s4m_d2.files import refused_object
from s4m_d2.pretrained import PYPI, read_pypi_weights
from s4m_d2.restricted_pickle import load_arrays

LAST_CHECKPOINT = "last_checkpoint"
FINAL_CHECKPOINT = "model_final.pth"
_FINAL_POSITION = sys.maxsize
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_SAFETENSORS = b'{"'  # begins the header, after its length in 8 bytes
_HEAD_BYTES = 64

logger = logging.getLogger(__name__)


def read_weight_file(path: str, *, mapped: bool = False) -> dict[str, Any]:
    """Read a ``.pth`` (PyTorch), ``.pkl`` (NumPy arrays) or ``.safetensors`` file.

    The format is recognized by the content. Tensors are on the CPU.

    Args:
        path: of the file, or :data:`s4m_d2.pretrained.ADDRESS`.
        mapped: memory-map the tensors of a ``.pth``, to read only names and shapes (not PyTorch's
            oldest format).

    Raises:
        WeightsError: the file is missing, damaged, contains code, or is not a weight file.
    """
    if path.startswith(PYPI):
        return read_pypi_weights(path)
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else f"no such file, seen from '{os.getcwd()}'"
        raise WeightsError(
            f"Weights '{path}': {found}. Give the path of a .pth, .pkl or .safetensors file (keys "
            "MODEL.WEIGHTS, S4M.TEACHER_WEIGHTS)."
        )
    try:
        content = _read(path, mapped)
    except Exception as error:  # of any kind: the unpickler checks little
        if name := refused_object(error):
            raise WeightsError(
                f"Weights '{path}' hold Python objects ({name}), which are refused because "
                "loading them may run code. Save a dictionary of tensors (model.state_dict())."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"Weights '{path}' are truncated, damaged, a web page, a Git LFS pointer or none "
            f"({reason}). Get the file again, PyTorch's .pth, a .pkl of arrays or .safetensors."
        ) from error
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise WeightsError(f"Weights '{path}': expected a dictionary of tensors, found a {kind}.")
    return dict(content)


def _read(path: str, mapped: bool) -> Any:
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith((_ZIP, _TORCH_LEGACY)):
        mapped = mapped and head.startswith(_ZIP)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not head.startswith(_SAFETENSORS, 8) and not path.endswith(".safetensors"):
        with open(path, "rb") as file:
            return load_arrays(file)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("its reader is missing: pip install safetensors") from error
    return load_file(path)


def read_complete(path: str) -> dict[str, Any]:
    """Read a checkpoint after verifying the checksums of all its parts; errors: WeightsError."""
    wrong: Any = None
    try:
        if zipfile.is_zipfile(path):  # but PyTorch's oldest format, which has no checksums
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
    except Exception as error:  # of any kind
        wrong = error
    if wrong:
        raise WeightsError(f"Weights '{path}' are damaged ({wrong}).")
    return read_weight_file(path)


def numbered_name(iteration: int) -> str:
    """Name, without ".pth", of the checkpoint written after an iteration (from 0)."""
    return f"model_{iteration:07d}"


def _position(name: str) -> int | None:
    """Iteration of a checkpoint by its name, the final one's is the largest; None: not one."""
    match = _NUMBERED.fullmatch(name)
    return _FINAL_POSITION if name == FINAL_CHECKPOINT else int(match[1]) if match else None


def ranked(folder: str, first: str = "") -> list[str]:
    """Names of a folder's checkpoints in the order in which to try to resume from them.

    ``first``, even if it does not exist; then earlier ones, the latest first; then later ones, the
    earliest first. Without ``first``, all from the latest to the earliest.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    places = {name: place for name in found if (place := _position(name)) is not None}
    limit = _position(first)
    limit = _FINAL_POSITION if limit is None else limit
    order = sorted(places, key=lambda name: (places[name] > limit, abs(places[name] - limit)))
    return [first, *(name for name in order if name != first)] if first else order


def tagged(folder: str) -> str:
    """Name in ``last_checkpoint``; "" if it is missing or unreadable."""
    try:
        with open(os.path.join(folder, LAST_CHECKPOINT), encoding="utf-8") as file:
            name = file.read().strip()
    except (OSError, ValueError):
        return ""
    return name if name.isprintable() else ""


def holds_run(folder: str) -> bool:
    """True if this folder has a checkpoint that could be resumed or overwritten."""
    return os.path.exists(os.path.join(folder, LAST_CHECKPOINT)) or bool(ranked(folder))


def superseded(folder: str, newest: str, keep: int) -> list[str]:
    """Numbered checkpoints to remove after ``newest`` was written, to keep ``keep``; 0: all."""
    names = [name for name in ranked(folder, newest) if _NUMBERED.fullmatch(name)]
    return names[keep:] if keep else []


def find_complete(folder: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the first complete one of a folder's :func:`ranked` checkpoints.

    WeightsError: there is none.
    """
    problems: list[S4MError] = []
    for name in ranked(folder, tagged(folder)):
        path = os.path.join(folder, name)
        content, errors = attempt(read_complete, path)
        if content is not None:
            for problem in problems:
                logger.warning("%s Continuing from '%s' instead, the same run.", problem, path)
            return name, content
        problems += errors
    reasons = " ".join(map(str, problems)) or "There is none."
    raise WeightsError(
        f"Cannot continue: '{folder}' holds no complete checkpoint. {reasons} Copy a complete "
        f"file there and write its name into '{LAST_CHECKPOINT}', or begin anew in another "
        "OUTPUT_DIR."
    )


def saved_state(folder: str) -> tuple[str, dict[str, Any]]:
    """As :func:`find_complete`, memory-mapped, without verifying checksums; ("", {}): none."""
    for name in ranked(folder, tagged(folder)):
        with contextlib.suppress(WeightsError, OSError):
            return name, read_weight_file(os.path.join(folder, name), mapped=True)
    return "", {}


def has_final(folder: str) -> bool:
    """True if the folder has a final checkpoint that is not truncated; little of it is read."""
    return zipfile.is_zipfile(os.path.join(folder, FINAL_CHECKPOINT))
