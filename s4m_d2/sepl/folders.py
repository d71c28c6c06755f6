"""A folder of pseudo-labels in, a folder of enhanced label maps out; what is there is finished."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
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
    """The files of the image ``name``; ``image`` None: there is none, or it is not asked for."""

    name: str
    label: Path
    image: Path | None


class Outcome(NamedTuple):
    """What became of an image: why nothing was written ("": it was), whether it has a class."""

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
        S4MError: for reasons that concern other images too; the image's own are the outcome's.
    """
    name, _, image = files
    try:
        label = read_label(files.label, num_classes, background_score)
        if image and (upright := image_size(str(image))) != label.shape:
            raise DatasetError(
                f"{files.label} has (height, width) {label.shape}, but {image}, turned upright as "
                f"its EXIF data say, has {upright}. Take the pair that belongs together, at one "
                "size and upright."
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
    """Start or continue a run into a folder; which of the images ``names`` are finished there.

    Raises:
        ConfigError: it has label maps of these images, made with other settings or unknown ones.
        OutputError: the folder cannot be written.
    """
    finished = {name for name in names if (folder / f"{name}.png").exists()}
    if overwrite:
        for name in finished:
            (folder / f"{name}.png").unlink()
        finished = set()
    elif finished:
        _check_settings(folder, settings, finished)
    write_report(folder, settings, {})
    return finished


def write_report(folder: Path, settings: Mapping[str, Any], problems: Mapping[str, str]) -> None:
    """Note in a folder what its label maps depend on, and why images have none."""
    with atomic_write(folder / REPORT) as file:
        json.dump({"settings": settings, "problems": problems}, file, indent=1)
        file.write("\n")


def _check_settings(folder: Path, settings: Mapping[str, Any], names: Collection[str]) -> None:
    remedy = "Choose another --output, or make them anew with --overwrite."
    held = f"'{folder}' has {len(names)} label maps of these images ({min(names)}, ...)"
    try:
        earlier = json.loads((folder / REPORT).read_text(encoding="utf-8"))["settings"]
        keys = dict.fromkeys((*earlier, *settings))
        pairs = {key: (earlier.get(key), settings.get(key)) for key in keys}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{held}, but no readable {REPORT} that says what they are: {error!r}. {remedy}"
        ) from error
    differing = [f"{key} was {a!r}, now {b!r}" for key, (a, b) in pairs.items() if a != b]
    if differing:
        raise ConfigError(f"{held}, made with other settings: {'; '.join(differing)}. {remedy}")


def outcomes(
    work: Callable[[ImageFiles], Outcome], jobs: Sequence[ImageFiles], workers: int
) -> Generator[Outcome, None, None]:
    """What becomes of each image, in their order, whatever the number of processes.

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
            yield from pool.map(work, jobs)  # where this ends early, what waits is cancelled
        except BrokenProcessPool as error:
            raise WorkerError(
                f"one of the {workers} processes has ended by itself: was it killed, or out of "
                "memory? What is finished is kept; start again, with fewer --workers."
            ) from error


def _start_worker() -> None:
    """Leave interrupts to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed does not tell its workers, which would wait for it forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
