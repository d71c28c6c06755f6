"""Enhancement of a folder of pseudo-labels; existing label maps count as finished."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from s4m_d2.data.images import image_size
from s4m_d2.errors import ConfigError, DatasetError, InputError, WorkerError
from s4m_d2.files import atomic_write
from s4m_d2.sepl.files import read_label, write_label
from s4m_d2.sepl.masks import SamMasks, folder_masks
from s4m_d2.sepl.rule import BACKGROUND, VOID, enhance

REPORT = "sepl.json"  # in the output folder: settings of its label maps, problems of the last run


class ImageFiles(NamedTuple):
    """The files of the image ``name``; ``image`` None: missing, or not needed."""

    name: str
    label: Path
    image: Path | None


class Outcome(NamedTuple):
    """Result of an image: why nothing was written ("": written), whether it has a class."""

    name: str
    problem: str
    has_class: bool


def enhance_files(
    files: ImageFiles,
    *,
    output: Path,
    source: Path | SamMasks,
    num_classes: int,
    background_score: float,
    **options: Any,
) -> Outcome:
    """Write the enhanced label map of an image.

    Args:
        output: folder of the label maps.
        source: of the masks: a folder, or SAM, which needs the image.
        num_classes: with background.
        background_score: of labels that are CAM scores.
        options: of :func:`~s4m_d2.sepl.enhance`.

    Raises:
        S4MError: for problems that concern other images too; the image's own are in the outcome.
    """
    name, _, image = files
    try:
        label = read_label(files.label, num_classes, background_score)
        if image and (upright := image_size(str(image))) != label.shape:
            raise DatasetError(
                f"{files.label} has (height, width) {label.shape}, but {image}, upright as its "
                f"EXIF data say, has {upright}."
            )
        if isinstance(source, SamMasks):
            assert image is not None  # without one there is no job
            masks = source.masks(name, image, label.shape)
        else:
            masks = folder_masks(source, name, label.shape)
        enhanced = enhance(label, masks, **options)
    except (DatasetError, InputError) as error:
        return Outcome(name, str(error), False)
    write_label(output / f"{name}.png", enhanced)
    return Outcome(name, "", bool(np.setdiff1d(label, (BACKGROUND, VOID)).size))


def begin(
    folder: Path, settings: Mapping[str, Any], names: Iterable[str], overwrite: bool
) -> set[str]:
    """Start or continue a run into a folder; returns the finished ones of the images ``names``.

    Raises:
        ConfigError: it has label maps of these images made with other or unknown settings.
        OutputError: the folder cannot be written.
    """
    finished = {name for name in names if (folder / f"{name}.png").exists()}
    if overwrite:
        for name in finished:
            (folder / f"{name}.png").unlink()
        finished = set()
    elif finished:
        try:
            earlier = dict(json.loads((folder / REPORT).read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, TypeError, LookupError):
            earlier = {REPORT: "unreadable"}
        keys = [k for k in {**earlier, **settings} if earlier.get(k) != settings.get(k)]
        if keys:
            differing = [f"{k} was {earlier.get(k)!r}, now {settings.get(k)!r}" for k in keys]
            raise ConfigError(
                f"'{folder}' has {len(finished)} label maps of these images ({min(finished)}, ...) "
                f"of other settings: {'; '.join(differing)}. Choose another --output, or make them "
                "anew with --overwrite."
            )
    write_report(folder, settings, {})
    return finished


def write_report(folder: Path, settings: Mapping[str, Any], problems: Mapping[str, str]) -> None:
    """Write the settings of the label maps in a folder, and why images have none."""
    with atomic_write(folder / REPORT) as file:
        json.dump({"settings": settings, "problems": problems}, file, indent=1)
        file.write("\n")


def outcomes(
    work: Callable[[ImageFiles], Outcome], jobs: Sequence[ImageFiles], workers: int
) -> Generator[Outcome, None, None]:
    """Process the images; yields their outcomes in order, independent of the number of processes.

    Args:
        work: :func:`enhance_files` with its settings.
        workers: processes, each with one thread; 1: this one.

    Raises:
        S4MError: as those of ``work``.
        WorkerError: a process has ended by itself.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as workers have: their number moves sums by rounding
        try:
            yield from map(work, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(work, jobs)  # if this ends early, pending jobs are cancelled
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of the {workers} processes has ended by itself: was it killed, or out of "
                "memory? What is finished is kept; start again, with fewer --workers."
            ) from error


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
