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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from s4m_d2.data.images import image_size
from s4m_d2.errors import ConfigError, DatasetError, InputError, OutputError, WorkerError
from s4m_d2.files import atomic_write
from s4m_d2.sepl.files import read_label, write_label
from s4m_d2.sepl.masks import MaskFolder, SamMasks
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


@dataclass(frozen=True)
class Enhancer:
    """Enhances images file by file; goes to other processes as it is.

    Attributes:
        labels, output: folders of the label maps.
        source: of the masks.
        num_classes: with background.
        background_score: of labels that are CAM scores.
        o_s_thresh, o_p_thresh, keep_uncovered: of :func:`~s4m_d2.sepl.enhance`.
    """

    labels: Path
    output: Path
    source: MaskFolder | SamMasks
    num_classes: int
    background_score: float
    o_s_thresh: float
    o_p_thresh: float
    keep_uncovered: bool

    def settings(self) -> dict[str, Any]:
        """What the results depend on, as JSON has it."""
        names = "o_s_thresh", "o_p_thresh", "keep_uncovered", "num_classes", "background_score"
        return {
            "pseudo_labels": str(self.labels.resolve()),
            **{name: getattr(self, name) for name in names},
            **self.source.settings(),
        }

    def __call__(self, files: ImageFiles) -> Outcome:
        """Write the enhanced label map of an image.

        Raises:
            S4MError: for reasons that concern other images too; the image's own are the outcome's.
        """
        try:
            label = read_label(files.label, self.num_classes, self.background_score)
            if files.image and (upright := image_size(str(files.image))) != label.shape:
                raise DatasetError(
                    f"{files.label} has (height, width) {label.shape}, but {files.image}, turned "
                    f"upright as its EXIF data say, has {upright}. Take the pair that belongs "
                    "together, at one size and upright."
                )
            enhanced = enhance(
                label,
                self.source.masks(files.name, files.image, label.shape),
                o_s_thresh=self.o_s_thresh,
                o_p_thresh=self.o_p_thresh,
                keep_uncovered=self.keep_uncovered,
            )
        except (DatasetError, InputError) as error:
            return Outcome(files.name, str(error), False)
        write_label(self.output / f"{files.name}.png", enhanced)
        has_class = bool(((label != BACKGROUND) & (label != VOID)).any())
        return Outcome(files.name, "", has_class)


def begin(
    folder: Path, settings: Mapping[str, Any], names: Iterable[str], overwrite: bool
) -> set[str]:
    """Start or continue a run into a folder; which of the images ``names`` are finished there.

    Raises:
        ConfigError: it has label maps of these images, made with other settings.
        OutputError: its report is damaged, or the folder cannot be written.
    """
    finished = {name: folder / f"{name}.png" for name in names}
    finished = {name: path for name, path in finished.items() if path.exists()}
    if overwrite:
        for path in finished.values():
            path.unlink()
        finished = {}
    elif finished:
        _check_settings(folder, settings, finished)
    write_report(folder, settings, {})
    return set(finished)


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
    except FileNotFoundError as error:
        raise ConfigError(f"{held}, but no {REPORT} that says what they are. {remedy}") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise OutputError(
            f"'{folder / REPORT}' is no report of this command, or damaged: {error!r}. {remedy}"
        ) from error
    differing = [f"{key} was {a!r}, now {b!r}" for key, (a, b) in pairs.items() if a != b]
    if differing:
        raise ConfigError(f"{held}, made with other settings: {'; '.join(differing)}. {remedy}")


def outcomes(
    work: Callable[[ImageFiles], Outcome], jobs: Sequence[ImageFiles], workers: int
) -> Generator[Outcome, None, None]:
    """What becomes of each image, in their order, whatever the number of processes.

    Args:
        work: an :class:`Enhancer`.
        jobs: the images.
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
