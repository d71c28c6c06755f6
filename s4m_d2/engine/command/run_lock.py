"""One training per OUTPUT_DIR."""

from __future__ import annotations

import os
import socket
import time

from s4m_d2.errors import ConfigError

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_MOST_BYTES = 200


def lock_run(folder: str) -> None:
    """Reserve a folder that exists for this process until it ends, however it does.

    The lock is the system's (a record lock: forked processes do not keep it alive); the file tells
    others who has it. Without effect where the folder or its file system takes no locks.

    Raises:
        ConfigError: another process has it.
    """
    if fcntl is None:
        return
    try:
        file = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # what a run cannot write is told elsewhere
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(file, _MOST_BYTES).decode("utf-8", "replace")
        os.close(file)
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' is in use by another run: {owner or 'it does not say which'}. "
            "Wait for its end or stop it, or choose another OUTPUT_DIR."
        ) from None
    except OSError:  # such as NFS without its lock service
        os.close(file)
        return
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode(), 0)
    # Left open: to close any handle of the file would free it.
