"""``sepl.json``, the report of ``sepl enhance``: what a folder's label maps came from."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s4m_d2.errors import ConfigError, OutputError
from s4m_d2.files import atomic_write, remove_temporaries
from s4m_d2.sepl.enhance_image import OUTPUT_SUFFIX, Outcome

REPORT = "sepl.json"
WRITE_EVERY = 100  # finished images: as many at most are made again after a run was killed


@dataclass
class Report:
    """What is known of the label maps in an output folder.

    Attributes:
        folder: the output folder.
        settings: what results depend on; JSON's types.
        classes: names, with background.
        records: facts on each finished image by name.
        failed, missing: reasons by name, of this run.
    """

    folder: Path
    settings: Mapping[str, Any]
    classes: Sequence[str]
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def resume(self, names: Iterable[str]) -> None:
        """Take over the records of earlier runs whose label maps are there.

        Raises:
            ConfigError: those were made with other settings; or of the images ``names`` there are
                label maps, but no report.
            OutputError: their report is damaged.
        """
        earlier = _read_report(self.folder / REPORT)
        if earlier is None:
            foreign = list(filter(self._has_label, names))
            if foreign:
                raise ConfigError(
                    f"'{self.folder}' has {len(foreign)} label maps of these images ({foreign[0]}, "
                    f"...), but no {REPORT} that says what they are. Choose another --output, or "
                    "replace them with --overwrite."
                )
            return
        records, differing = earlier["images"], _differences(earlier["settings"], self.settings)
        if records and differing:
            raise ConfigError(
                f"'{self.folder}' holds {len(records)} label maps made with other settings: "
                f"{'; '.join(differing)}. Choose another --output, or make them anew with "
                "--overwrite."
            )
        self.records = {name: records[name] for name in records if self._has_label(name)}

    def add(self, outcome: Outcome) -> None:
        """Note what became of an image."""
        if outcome.record is None:
            reasons = self.missing if outcome.is_missing else self.failed
            reasons[outcome.name] = outcome.problem
            return
        self.records[outcome.name] = outcome.record
        if not len(self.records) % WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Write all of it. What is not in it counts as unfinished, whatever files there are.

        Raises:
            OutputError: the system refuses.
        """
        reasons = {"failed": self.failed, "missing": self.missing}
        content = {
            "settings": self.settings,
            "classes": self.classes,
            "counts": {"done": len(self.records), **{kind: len(reasons[kind]) for kind in reasons}},
            "images": dict(sorted(self.records.items())),
            **{kind: dict(sorted(reasons[kind].items())) for kind in reasons},
            "outdated": self.outdated(),
        }
        with atomic_write(self.folder / REPORT) as file:
            json.dump(content, file, indent=1)
            file.write("\n")

    def outdated(self) -> list[str]:
        """Images that could not be enhanced, but have a label map from an earlier run."""
        return sorted(filter(self._has_label, (*self.failed, *self.missing)))

    def _has_label(self, name: str) -> bool:
        return (self.folder / f"{name}{OUTPUT_SUFFIX}").exists()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the output folder, keep other runs out of it, and clear what a killed one left.

    Raises:
        OutputError: another run writes to it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"'{folder}' cannot be written: {error.strerror or error}. Free space or correct the "
            "permissions, or choose another --output."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_temporaries(folder)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(
            f"another run writes to '{folder}'. Wait for it, or choose another --output."
        ) from error
    except OSError:  # network file systems lock no folders
        pass
    try:
        yield
    finally:
        os.close(handle)


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


def _differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} was {earlier.get(key)!r}, now {now.get(key)!r}"
        for key in dict.fromkeys((*earlier, *now))
        if earlier.get(key) != now.get(key)
    ]
