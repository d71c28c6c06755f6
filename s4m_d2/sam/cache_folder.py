"""A folder of bounded size with small files, which several processes may share."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from s4m_d2.files import atomic_write

logger = logging.getLogger(__name__)

# Also what atomic_write leaves in a process that is killed: it counts, grows old and goes.
_FILE = re.compile(r"\.?sam_[0-9a-f]{64}\.pt(\.\w{8}\.tmp)?")
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_SCANS = 64  # the folder is listed again after own writes of this part of its bound


class CacheFolder:
    """Contents by key; each file begins with a checksum over its key and its content.

    What does not look like an entry by its name is never touched.

    Args:
        folder: is made by the first write.
        max_bytes: of all entries. With several processes it may be passed by 1/64 for each of the
            others, whose latest writes one does not know.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._bytes: int | None = None  # of all entries, as far as known; None: not listed yet
        self._since_listing = 0  # own bytes
        self._writes = True
        self._warned_of_damage = False

    def path(self, key: str) -> Path:
        """The file of a key, 64 hexadecimal digits."""
        return self.folder / f"sam_{key}.pt"

    def read(self, key: str) -> bytes | None:
        """The content, which counts as used now; None where there is none that is sound."""
        path = self.path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warn_of_damage(key, str(error))
            return None
        checksum, content = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
        if checksum != _checksum(key, content):
            self.warn_of_damage(key, "its checksum is wrong")
            return None
        with suppress(OSError):  # gone since, or a folder to be read only
            os.utime(path)
        return content

    def write(self, key: str, content: bytes) -> None:
        """Keep a content, and let old ones go for it. What cannot be written is warned of once."""
        size = len(content) + _CHECKSUM_BYTES
        if not self._writes:
            return
        if size > self.max_bytes:
            self._stop_writing(f"an entry has {size:,} bytes, the bound is {self.max_bytes:,}")
            return
        try:
            self._make_room(size)
            with atomic_write(self.path(key), "wb") as file:
                file.write(_checksum(key, content))
                file.write(content)
        except OSError as error:  # OutputError too
            self._stop_writing(str(error))

    def warn_of_damage(self, key: str, what: str) -> None:
        """Say once that an entry cannot be used."""
        if not self._warned_of_damage:
            self._warned_of_damage = True
            logger.warning(
                "S4M.SAM.CACHE: '%s' cannot be used (%s): it is computed and written anew, as are "
                "others like it, without another message",
                self.path(key), what,
            )  # fmt: skip

    def _make_room(self, size: int) -> None:
        """Remove the entries used longest ago until ``size`` bytes more are within the bound."""
        held = self._bytes
        unseen = self._since_listing + size > self.max_bytes // _SCANS
        if held is None or unseen or held + size > self.max_bytes:
            files = sorted(self._files())
            self._bytes = held = sum(length for _, _, length in files)
            self._since_listing = 0
            for _, path, length in files:
                if held + size <= self.max_bytes:
                    break
                with suppress(FileNotFoundError):  # another process was faster
                    os.unlink(path)
                self._bytes = held = held - length
        self._bytes = held + size
        self._since_listing += size

    def _files(self) -> list[tuple[int, str, int]]:
        """(time of the last use in ns, path, bytes) of each entry."""
        found: list[tuple[int, str, int]] = []
        if not self.folder.is_dir():
            return found
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime_ns, entry.path, status.st_size))
        return found

    def _stop_writing(self, why: str) -> None:
        self._writes = False
        logger.warning(
            "S4M.SAM.CACHE: '%s' is only read from now on: %s", self.folder, why.rstrip(".")
        )


def _checksum(key: str, content: bytes) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(content)
    return digest.digest()
