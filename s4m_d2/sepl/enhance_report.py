"""``sepl.json``, the report of ``sepl enhance``, and its journal: what a folder's labels came from.

The report is written whole, at the beginning of a run and at its end. In between the record of
each finished image is appended to the journal, ``sepl.jsonl``, so that a run that is killed at any
point loses none but those it was working on. The next run reads both.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from s4m_d2.errors import ConfigError, OutputError
from s4m_d2.files import atomic_write, remove_temporaries
from s4m_d2.sepl.enhance_image import OUTPUT_SUFFIX, Outcome

REPORT = "sepl.json"
JOURNAL = "sepl.jsonl"


class Report:
    """What is known of the label maps in an output folder.

    Attributes:
        folder: the output folder.
        settings: what results depend on; JSON's types.
        classes: names, with background.
        records: facts on each finished image by name.
        failed, missing: reasons by name, of this run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], classes: Iterable[str]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.classes = list(classes)
        self.records: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.missing: dict[str, str] = {}

    def resume(self) -> None:
        """Take over the records of earlier runs.

        Raises:
            ConfigError: those were made with other settings.
            OutputError: their report is damaged.
        """
        earlier = _read_report(self.folder / REPORT)
        if earlier is None:
            return
        records = {**earlier["images"], **_read_journal(self.folder / JOURNAL)}
        differing = _differences(earlier["settings"], self.settings)
        if records and differing:
            raise ConfigError(
                f"'{self.folder}' holds {len(records)} label maps made with other settings: "
                f"{'; '.join(differing)}. Choose another --output, or make them anew with "
                "--overwrite."
            )
        self.records = records

    def add(self, outcome: Outcome, journal: IO[str]) -> None:
        """Note what became of an image; ``journal`` is that of :meth:`writing`."""
        if outcome.record is None:
            reasons = self.missing if outcome.is_missing else self.failed
            reasons[outcome.name] = outcome.problem
            return
        self.records[outcome.name] = outcome.record
        try:
            journal.write(json.dumps([outcome.name, outcome.record]) + "\n")
            journal.flush()
        except OSError as error:
            raise _refused(self.folder / JOURNAL, error) from error

    def discard(self) -> None:
        """Forget earlier runs. Their label maps stay until new ones take their places."""
        # The journal first: it must not be taken for one of the report to come.
        (self.folder / JOURNAL).unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[IO[str]]:
        """The report on disk before and after the block, however it ends; a journal in between."""
        self._write()
        path = self.folder / JOURNAL
        try:
            journal = open(path, "w", encoding="utf-8")  # the report has what was in it before
        except OSError as error:
            raise _refused(path, error) from error
        try:
            with journal:
                yield journal
        finally:
            self._write()
            path.unlink()

    def _write(self) -> None:
        counts: dict[str, Mapping[str, Any]] = {
            "done": self.records,
            "failed": self.failed,
            "missing": self.missing,
        }
        content = {
            "settings": self.settings,
            "classes": self.classes,
            "counts": {name: len(entries) for name, entries in counts.items()},
            "images": _by_name(self.records),
            "failed": _by_name(self.failed),
            "missing": _by_name(self.missing),
            "outdated": self.outdated(),
        }
        with atomic_write(self.folder / REPORT) as file:
            file.write(_text(content))

    def outdated(self) -> list[str]:
        """Images that could not be enhanced, but have a label map from an earlier run."""
        return sorted(
            name
            for name in (*self.failed, *self.missing)
            if (self.folder / f"{name}{OUTPUT_SUFFIX}").exists()
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the output folder, keep other runs out of it, and clear what killed ones left.

    Raises:
        OutputError: another run writes to it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        is_alone = _lock(handle, folder)
        if is_alone:
            remove_temporaries(folder)
        yield
        if is_alone:
            remove_temporaries(folder)
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> bool:
    """Whether no other run is at work; False where the file system cannot tell."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"another run writes to '{folder}'. Wait for it, or choose another --output."
        ) from error
    except OSError:  # network file systems lock no folders
        return False
    return True


def _read_report(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(content["settings"], dict) and isinstance(content["images"], dict)):
            raise TypeError("settings and images must be objects")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"'{path}' is no report of this command, or damaged: {error!r}. Choose another "
            "--output, or make everything anew with --overwrite."
        ) from error
    return content


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Records of a run that was killed, perhaps while it wrote the last line."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    records = {}
    for line in lines:
        try:
            name, record = json.loads(line)
        except (ValueError, TypeError):
            break
        records[name] = record
    return records


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {earlier.get(key)!r}, now {now.get(key)!r}"
        for key in dict.fromkeys((*earlier, *now))
        if earlier.get(key) != now.get(key)
    ]


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of an inner object."""
    parts = []
    for key, value in content.items():
        text = json.dumps(value)
        if value and isinstance(value, dict):
            entries = (
                f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()
            )
            text = "{\n" + ",\n".join(entries) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _by_name(entries: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(entries.items()))


def _refused(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"'{path}' cannot be written: {error.strerror or error}. Free space or correct the "
        "permissions, or choose another --output."
    )
