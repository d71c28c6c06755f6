"""Atomic writes, lines of names and of JSON, digests of files."""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from s4m_d2.errors import DatasetError, OutputError

# Errors of a disk that is full, read-only or broken while a file is being written.
_DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EISDIR)
)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read a text file's lines, stripped, no empty ones at the end; DatasetError: it is none."""
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            return [line.strip() for line in file.read().rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"'{path}' cannot be read: {error}. Give a text file with one name per line."
        ) from error


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO]:
    """Open a temporary file next to ``path`` and rename it to ``path`` when the block succeeds.

    The content is on disk before the rename, so that after a crash or power failure ``path`` has
    the old or the new content. If the block raises, the old file stays, the temporary one goes.

    Raises:
        OutputError: the disk is full or read-only, or permissions are missing.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(temporary, mode.replace("w", "x"))
    except OSError as error:
        raise _refused(path, error) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except OSError as error:  # such as another user's file in a folder that all may write to
            raise _refused(path, error) from error
    except BaseException as error:
        os.unlink(temporary)
        cause = disk_error(error)
        if cause is None:
            raise
        raise _refused(path, cause) from error
    _sync_folder(folder)


def write_json(path: str | os.PathLike[str], content: object, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=indent)


def digest(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content; "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    except OSError:
        return ""


def remove_temporaries(folder: str | os.PathLike[str]) -> list[str]:
    """Remove temporary files of :func:`atomic_write` that killed processes left in a folder.

    Only for a folder that no other process writes to. Returns the names, sorted.
    """
    if not os.path.isdir(folder):
        return []
    names = sorted(name for name in os.listdir(folder) if re.fullmatch(r"\..+\.\w{8}\.tmp", name))
    for name in names:
        os.unlink(os.path.join(folder, name))
    return names


def remove_lines(path: str, first: int) -> None:
    """Truncate a file of JSON lines before the first record of ``first`` or a later iteration.

    An incomplete last line of a killed process is removed too.
    """
    if not os.path.isfile(path):
        return
    size = 0
    with open(path, "rb+") as file:
        for line in file:
            found = re.search(rb'"iteration": (\d+)', line)
            if not line.endswith(b"\n") or (found and int(found[1]) >= first):
                break
            size += len(line)
        file.truncate(size)


def disk_error(error: BaseException | None) -> OSError | None:
    """Find the disk error that caused ``error``, which a library may have wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _refused(path: str, error: OSError) -> OutputError:
    return OutputError(
        f"'{path}' cannot be written: {error.strerror or error}. What the file held before is as "
        "it was. Free space or correct the permissions, or choose another folder."
    )


def _sync_folder(folder: str) -> None:
    """Make the rename itself durable, if the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
