"""The checkpoint files of a stage: which there are, which are as written, which may go."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Collection
from typing import Any

from s4m_d2.engine.checkpointing.weight_files import is_archive, read_weight_file
from s4m_d2.errors import WeightsError
from s4m_d2.files import TENSOR_FILE_ERRORS

LAST_CHECKPOINT = "last_checkpoint"
FINAL_CHECKPOINT = "model_final.pth"
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")
_FINAL = math.inf

logger = logging.getLogger(__name__)


def numbered_name(iteration: int) -> str:
    """Name, without ".pth", of the checkpoint written after an iteration, counted from 0."""
    return f"model_{iteration:07d}"


def _position(name: str) -> float | None:
    """The iteration that a name tells, infinite for the final one, None for no checkpoint."""
    if name == FINAL_CHECKPOINT:
        return _FINAL
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None


def ranked(folder: str, first: str = "") -> list[str]:
    """Names of the checkpoints of a folder, in the order in which to try to continue from them.

    ``first``, whether it exists or not; then those before it, the latest first; then those after
    it, the earliest first. Without ``first``, all from the latest to the earliest.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    positions = {name: _position(name) for name in found if name != first}
    places = {name: place for name, place in positions.items() if place is not None}
    limit = _position(first)
    limit = _FINAL if limit is None else limit
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

    ``newest`` and the final one always stay; damaged ones go first.
    """
    names = [name for name in ranked(folder, newest) if _NUMBERED.fullmatch(name)]
    kept = [name for name in names if name == newest or name not in damaged][:keep]
    return [name for name in names if name not in kept]


def read_complete(path: str) -> dict[str, Any]:
    """The content of a checkpoint, all of it as it was written (checksums of all its parts).

    Raises:
        WeightsError: the file is missing, ends early, is damaged or cannot be read.
    """
    try:
        if is_archive(path):
            _check_sums(path)
        return read_weight_file(path)
    except OSError as error:
        raise WeightsError(f"Weights '{path}' cannot be read ({error}).") from error


def _check_sums(path: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except (*TENSOR_FILE_ERRORS, zlib.error) as error:
        raise WeightsError(f"Weights '{path}' are damaged ({error}).") from error
    if wrong is not None:
        raise WeightsError(f"Weights '{path}' are damaged: the checksum of '{wrong}' is wrong.")


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


def is_finished(folder: str, iterations: int, results: str | None) -> bool:
    """Whether a stage's final checkpoint is complete, and its evaluation, if any, done since.

    Args:
        folder: of the stage.
        iterations: that the stage is to have.
        results: name of the file that the evaluation writes; None: there is no evaluation.
    """
    final = os.path.join(folder, FINAL_CHECKPOINT)
    if not os.path.isfile(final):
        return False
    if results is not None:
        results = os.path.join(folder, results)
        if not os.path.isfile(results) or os.stat(results).st_mtime_ns < os.stat(final).st_mtime_ns:
            return False
    try:
        content = read_complete(final)
    except WeightsError as error:
        logger.warning("The stage is continued, because its result is unusable. %s", error)
        return False
    return content.get("iteration", iterations) + 1 >= iterations
