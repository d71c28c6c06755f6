"""Videos of drawn frames."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from s4m_d2.errors import InputError, OutputError

CODEC = "mp4v"  # MPEG-4 part 2: OpenCV's packages can write it everywhere, H.264 they cannot
SUFFIX = ".mp4"


@contextmanager
def write_video(path: str | os.PathLike[str], fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4, frame by frame; it appears when it is complete.

    Yields a function that takes (H, W, 3) uint8 RGB frames of one size. Where a side is odd, which
    the codec does not have, its last line is repeated. When the block raises, or no frame came,
    nothing is left.

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
    with temporary as name:
        part = os.path.join(name, f"part{SUFFIX}")
        frames = _Frames(part, path, fps)
        try:
            yield frames.add
        finally:
            frames.close()
        if frames.count:
            _check_written(part, path, frames.count)
            os.replace(part, path)


class _Frames:
    def __init__(self, part: str, path: str, fps: float) -> None:
        self.part, self.path, self.fps = part, path, fps
        self.count = 0
        self._size: tuple[int, int] = (0, 0)
        self._writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        height, width = frame.shape[:2]
        if self._writer is None:
            self._size = height, width
            even = width + width % 2, height + height % 2
            codec = cv2.VideoWriter.fourcc(*CODEC)
            self._writer = cv2.VideoWriter(self.part, codec, self.fps, even)
            if not self._writer.isOpened():
                raise OutputError(
                    f"'{self.path}' cannot be written: this OpenCV has no codec {CODEC}, or the "
                    "folder cannot be written to. pip install opencv-python-headless has it."
                )
        if (height, width) != self._size:
            raise InputError(f"frames of '{self.path}' are {self._size}, got {(height, width)}")
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        border = height % 2, width % 2
        self._writer.write(
            cv2.copyMakeBorder(bgr, 0, border[0], 0, border[1], cv2.BORDER_REPLICATE)
        )
        self.count += 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


def _check_written(part: str, path: str, count: int) -> None:
    """OpenCV does not say when the disk is full: ask the file."""
    capture = cv2.VideoCapture(part)
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if found != count:
        raise OutputError(
            f"'{path}' cannot be written: {found} of {count} frames arrived. Free space on the "
            "disk, or choose another folder."
        )
