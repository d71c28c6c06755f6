"""Enhancement of a folder of pseudo-labels; existing label maps count as finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from s4m_d2.errors import ConfigError, DatasetError, S4MError
from s4m_d2.files import atomic_write
from s4m_d2.sepl.files import BEFORE, IMAGE, ImageFiles, write_label
from s4m_d2.sepl.masks import SamMasks, read_masks
from s4m_d2.sepl.rule import BACKGROUND, VOID, enhance

REPORT = "sepl.json"  # in the output folder: settings of its label maps, problems of the last run


@dataclass(frozen=True)
class Enhancement(Dataset[bool | S4MError]):
    """Enhances pseudo-labels: item i writes the label map of the i-th image."""

    names: Sequence[str]  #: of the images
    files: ImageFiles  #: with pseudo-labels; with images too if they are given
    source: Path | SamMasks  #: of the masks: a folder, or SAM, which needs the images
    output: Path  #: folder of the label maps
    options: Mapping[str, Any]  #: of :func:`~s4m_d2.sepl.enhance`

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bool | S4MError:
        """Return whether the label map has a class, or why none was written.

        A DatasetError is a problem of this image, other errors concern all. They are returned, as a
        DataLoader adds its traceback to the message of one that is raised.
        """
        name = self.names[index]
        try:
            label = self.files.read_labels(name)[BEFORE]
            if isinstance(self.source, SamMasks):
                masks = self.source.masks(name, self.files.by_kind[IMAGE][name], label.shape)
            else:
                masks = read_masks(self.source, name, label.shape)
            write_label(self.output / f"{name}.png", enhance(label, masks, **self.options))
        except S4MError as error:
            return error
        return bool(np.setdiff1d(label, (BACKGROUND, VOID)).size)

    def run(self, workers: int) -> dict[str, bool | DatasetError]:
        """Make all items, with a progress bar: name of each image → its item.

        They do not depend on the number of workers: processes with one thread each; 1: this one.
        An S4MError that concerns all images, and the end of a process by itself, are raised.
        """
        workers = min(workers, len(self)) if workers > 1 else 0
        start = "spawn" if workers else None
        loader = DataLoader(self, None, num_workers=workers, multiprocessing_context=start)
        items: dict[str, bool | DatasetError] = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a DataLoader's processes: it moves sums by rounding
        try:
            for name, item in zip(self.names, tqdm(loader, "sepl", unit="image"), strict=True):
                if isinstance(item, S4MError) and not isinstance(item, DatasetError):
                    raise item
                items[name] = item
        finally:
            torch.set_num_threads(threads)
        return items


def begin(
    folder: Path, settings: dict[str, Any], names: Iterable[str], overwrite: bool
) -> set[str]:
    """Start or continue a run into a folder; returns the finished ones of the images ``names``.

    ConfigError: it has label maps of these images made with other or unknown settings.
    """
    finished = {name for name in names if (folder / f"{name}.png").exists()}
    if overwrite:
        for name in finished:
            (folder / f"{name}.png").unlink()
        finished.clear()
    elif finished:
        try:
            earlier = json.loads((folder / REPORT).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, LookupError):
            earlier = {REPORT: "unreadable"}
        if keys := [k for k in earlier | settings if earlier.get(k) != settings.get(k)]:
            differing = [f"{k} was {earlier.get(k)}, now {settings.get(k)}" for k in keys]
            raise ConfigError(
                f"'{folder}' has {len(finished)} label maps of other settings: "
                f"{'; '.join(differing)}. Choose another --output, or give --overwrite."
            )
    write_report(folder, settings, {})
    return finished


def write_report(folder: Path, settings: Mapping[str, Any], problems: Mapping[str, str]) -> None:
    """Write the settings of the label maps in a folder, and why images have none."""
    with atomic_write(folder / REPORT) as file:
        json.dump({"settings": settings, "problems": problems}, file, indent=1)
        file.write("\n")
