"""Files that a reader never sees half-written."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

_TEMPORARY = re.compile(r"\..+\.\w{8}\.tmp")  # as named by atomic_write
DEFAULT_PERMISSIONS = 0o666  # reduced by the user's umask, as open() does


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a temporary file next to ``path`` and rename it to ``path`` when the block succeeds.

    The content is on disk before the rename, so that after a crash or a power cut ``path`` holds
    either the old content or the new one. When the block raises, the old file stays as it was.
    """
    path = os.path.abspath(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    prefix = f".{os.path.basename(path)}."
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=".tmp")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, DEFAULT_PERMISSIONS & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(folder)


def remove_temporaries(folder: str | os.PathLike[str]) -> list[str]:
    """Remove what :func:`atomic_write` left in a folder in processes that were killed.

    Only for a folder that no other process writes to. Returns the names, sorted.
    """
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name))
    for name in names:
        os.unlink(os.path.join(folder, name))
    return names


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: str) -> None:
    """Make the rename itself durable, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
