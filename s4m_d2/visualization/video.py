"""Writing of videos."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from s4m_d2.errors import InputError, OutputError

CODEC = "mp4v"  # MPEG-4 part 2, which all OpenCV packages can write, unlike H.264
SUFFIX = ".mp4"


@contextmanager
def write_video(path: str | os.PathLike[str], fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4 frame by frame, atomically.

    Yields a function that takes (H, W, 3) uint8 RGB frames of one size. The last line of an odd
    side is repeated, as the codec needs even sides. If the block raises, or there is no frame, no
    file is written.

    Raises:
        InputError: ``path`` does not end in .mp4, or a frame has another size.
        OutputError: this OpenCV has no codec, or the disk is full or not the user's.
    """
    path = os.fspath(path)
    if not path.endswith(SUFFIX):
        raise InputError(f"'{path}' is to be a video: give a name in {SUFFIX}")
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".video.")
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    sizes: list[tuple[int, int]] = []  # of the frames so far
    writer = cv2.VideoWriter()
    with temporary as name:
        part = os.path.join(name, f"part{SUFFIX}")

        def add(frame: np.ndarray) -> None:
            sizes.append((frame.shape[0], frame.shape[1]))
            if sizes[0] != sizes[-1]:
                raise InputError(f"frames of '{path}' are {sizes[0]}, got {sizes[-1]}")
            bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
            odd = [side % 2 for side in sizes[0]]
            bgr = cv2.copyMakeBorder(bgr, 0, odd[0], 0, odd[1], cv2.BORDER_REPLICATE)
            codec = cv2.VideoWriter.fourcc(*CODEC)
            if len(sizes) == 1 and not writer.open(part, codec, fps, bgr.shape[1::-1]):
                raise OutputError(
                    f"'{path}' cannot be written: this OpenCV has no codec {CODEC}, or the folder "
                    "cannot be written to. pip install opencv-python-headless has it."
                )
            writer.write(bgr)

        try:
            yield add
        finally:
            writer.release()
        if sizes:
            _check_written(part, path, len(sizes))
            os.replace(part, path)


def _check_written(part: str, path: str, count: int) -> None:
    """Count the written frames: OpenCV does not report a full disk."""
    capture = cv2.VideoCapture(part)
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if found != count:
        raise OutputError(
            f"'{path}' cannot be written: {found} of {count} frames arrived. Free space on the "
            "disk, or choose another folder."
        )
