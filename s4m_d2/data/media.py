"""Images and videos that a user names: files, or all of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from s4m_d2.data.listing import IMAGE_EXTENSIONS, list_images
from s4m_d2.errors import DatasetError

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
USUAL_FPS = 25.0  # of a video that does not say
# Some formats estimate their number of frames: a video that has this share of it is complete.
COMPLETE = 0.95
_REMEDY = "Give images, videos, or a folder of them."


@dataclass(frozen=True)
class Media:
    """A file to look at.

    Attributes:
        path: as it can be opened.
        name: path below the folder that was given, or the file's own name.
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.lower().endswith(VIDEO_EXTENSIONS)


def find_media(inputs: Sequence[str], exclude: str = "") -> tuple[list[Media], dict[str, str]]:
    """The files that ``inputs`` name, in that order, those of folders sorted.

    Args:
        inputs: files, which need not exist, and folders, of which all images and videos are taken,
            also from folders below.
        exclude: a folder whose files are not taken from a folder, such as one of results.

    Returns:
        each file once, and the problem of each folder that has none.
    """
    found: dict[str, Media] = {}
    problems: dict[str, str] = {}
    excluded = os.path.join(os.path.realpath(exclude), "") if exclude else ""
    for given in inputs:
        if not os.path.isdir(given):
            found.setdefault(os.path.realpath(given), Media(given, os.path.basename(given)))
            continue
        try:
            paths = list_images(given, IMAGE_EXTENSIONS + VIDEO_EXTENSIONS, _REMEDY)
        except DatasetError as error:
            problems[given] = str(error)
            continue
        for path in paths:
            real = os.path.realpath(path)
            if not (excluded and real.startswith(excluded)):
                found.setdefault(real, Media(path, os.path.relpath(path, given)))
    return list(found.values()), problems


class Video:
    """A video, read one frame at a time.

    Attributes:
        path: as given.
        fps: frames a second.
        announced: how many frames it says it has; 0: it does not say.

    Raises:
        DatasetError: the file is missing, damaged or of an unknown format.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        capture = cv2.VideoCapture(path) if os.path.isfile(path) else None
        if capture is None or not capture.isOpened():
            what = "does not exist" if capture is None else "cannot be read as a video"
            raise DatasetError(f"{path} {what}. Give a video that OpenCV can open, such as .mp4.")
        self._capture = capture
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if np.isfinite(fps) and fps > 0 else USUAL_FPS
        self.announced = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, (H, W, 3) uint8 RGB; can be iterated once.

        Raises:
            DatasetError: after the last frame that can be read, if others should follow.
        """
        count = 0
        try:
            while True:
                there, frame = self._capture.read()
                if not there:
                    break
                count += 1
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            self._capture.release()
        if count == 0 or count < COMPLETE * self.announced:
            raise DatasetError(
                f"{self.path} ends after {count} of {self.announced} frames: it is damaged or "
                "truncated. Replace it with a fresh copy."
            )
