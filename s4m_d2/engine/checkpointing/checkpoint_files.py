"""The checkpoint files of a stage: which there are, which are as written, which may go."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

from s4m_d2.engine.checkpointing.weight_files import read_weight_file
from s4m_d2.errors import WeightsError
from s4m_d2.files import TENSOR_FILE_ERRORS, atomic_write

LAST_CHECKPOINT = "last_checkpoint"
FINAL_CHECKPOINT = "model_final.pth"
_FINAL_NOTE = "model_final.json"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")

logger = logging.getLogger(__name__)


def numbered_name(iteration: int) -> str:
    """Name, without ".pth", of the checkpoint written after an iteration, counted from 0."""
    return f"model_{iteration:07d}"


def _position(name: str) -> float | None:
    """The iteration that a name tells, infinite for the final one, None for no checkpoint."""
    match = _NUMBERED.fullmatch(name)
    return math.inf if name == FINAL_CHECKPOINT else int(match[1]) if match else None


def ranked(folder: str, first: str = "") -> list[str]:
    """Names of the checkpoints of a folder, in the order in which to try to continue from them.

    ``first``, whether it exists or not; then those before it, the latest first; then those after
    it, the earliest first. Without ``first``, all from the latest to the earliest.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    positions = {name: _position(name) for name in found if name != first}
    places = {name: place for name, place in positions.items() if place is not None}
    limit = _position(first)
    limit = math.inf if limit is None else limit
    before = sorted((n for n in places if places[n] <= limit), key=places.__getitem__, reverse=True)
    after = sorted((n for n in places if places[n] > limit), key=places.__getitem__)
    return [first, *before, *after] if first else before + after


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


def read_complete(path: str) -> dict[str, Any]:
    """The content of a checkpoint, all of it as it was written (checksums of all its parts).

    Raises:
        WeightsError: the file is missing, ends early, is damaged or cannot be read.
    """
    try:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # the reader will say
            if zipfile.is_zipfile(path):  # but PyTorch's oldest format, which has no checksums
                with zipfile.ZipFile(path) as archive:
                    if wrong := archive.testzip():
                        raise WeightsError(f"Weights '{path}' are damaged: checksum of '{wrong}'.")
        return read_weight_file(path)
    except WeightsError:
        raise
    except (*TENSOR_FILE_ERRORS, zlib.error) as error:
        raise WeightsError(f"Weights '{path}' are damaged ({error}).") from error


def find_complete(folder: str) -> tuple[str, dict[str, Any], list[str]]:
    """The checkpoint to continue from: what ``last_checkpoint`` names, or else the one before it.

    Returns:
        its name, its content, and the names of those that were passed over as damaged.

    Raises:
        WeightsError: there is none that is complete; says why for each.
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
