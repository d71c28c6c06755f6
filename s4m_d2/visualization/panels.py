"""Grids of pictures with titles and a legend; files of pictures and videos."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from s4m_d2.errors import OutputError, printable
from s4m_d2.files import atomic_write
from s4m_d2.visualization.drawing import ColorScale, text_font

# All in pixels.
CELL = 360  # width of a column; a higher picture is drawn narrower
GAP = 8
LINE = 34  # height of a line of text
TEXT = 16  # size of its letters
LETTER = 9  # width of a letter, about; longer texts are cut, and written smaller if still too long
SWATCH = 38, 24  # width, height
BAR = 140, 16  # of a color bar
CODEC = "mp4v"  # MPEG-4 part 2, which all OpenCV packages can write, unlike H.264

Item = TypeVar("Item")


@dataclass(frozen=True)
class Panels:
    """A figure with a titled column for each kind of picture and a row for each image.

    Pictures are (H, W, 3) uint8 RGB. Columns without pictures are omitted.
    """

    columns: Sequence[str]  #: their titles
    rows: Sequence[Sequence[np.ndarray | None]]  #: None: an empty cell
    row_titles: Sequence[str] | None = None  #: a line above each row
    legend: Sequence[tuple[str, np.ndarray]] = ()  #: names and their swatches, below the rows
    scale: ColorScale | None = None  #: of a color bar below the rows
    caption: str = ""  #: a line below everything

    def draw(self) -> np.ndarray:
        """Draw the figure, (H, W, 3) uint8 RGB."""
        return np.concatenate([np.asarray(strip) for strip in self._strips()])

    def _strips(self) -> Iterator[Image.Image]:
        """Parts of the figure, from top to bottom."""
        used = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        width = CELL * len(used)
        titles = [(self.columns[c], (p + 0.5) * CELL, CELL, "mm") for p, c in enumerate(used)]
        yield _line(width, *titles)
        for number, row in enumerate(self.rows):
            if self.row_titles is not None:
                yield _line(width, (self.row_titles[number], GAP, width, "lm"))
            yield _cells([row[i] for i in used])
        if self.scale is not None:
            yield _color_bar(width, self.scale)
        yield from _legend_lines(width, self.legend)
        if self.caption:
            yield _line(width, (self.caption, GAP, width, "lm"))


def panel_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str],
    path: str | os.PathLike[str],
    row_titles: Sequence[str] | None = None,
    legend: Sequence[tuple[str, np.ndarray]] = (),
) -> None:
    """Draw :class:`Panels` and write them as a PNG, atomically."""
    write_png(Panels(column_titles, rows, row_titles, legend).draw(), path)


def write_png(picture: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write an (H, W, 3) uint8 RGB picture as a PNG, atomically.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format="png")


@contextmanager
def write_video(path: str | os.PathLike[str], fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4, a path in .mp4, frame by frame, atomically.

    Yields a function that takes (H, W, 3) uint8 RGB frames of one size. The last line of an odd
    side is repeated, as the codec needs even sides. If the block raises, or there is no frame, no
    file is written.

    Raises:
        OutputError: this OpenCV has no codec, or the disk is full or not the user's.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".video.")
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror or error}.") from error
    writer, count = cv2.VideoWriter(), 0
    with temporary as name:
        part = os.path.join(name, "part.mp4")

        def add(frame: np.ndarray) -> None:
            nonlocal count
            count += 1
            bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
            odd = [side % 2 for side in bgr.shape[:2]]
            bgr = cv2.copyMakeBorder(bgr, 0, odd[0], 0, odd[1], cv2.BORDER_REPLICATE)
            codec = cv2.VideoWriter.fourcc(*CODEC)
            if count == 1 and not writer.open(part, codec, fps, bgr.shape[1::-1]):
                raise OutputError(
                    f"'{path}' cannot be written: this OpenCV has no codec {CODEC}, or the folder "
                    "cannot be written to. pip install opencv-python-headless has it."
                )
            writer.write(bgr)

        try:
            yield add
        finally:
            writer.release()
        if count == 0:
            return
        capture = cv2.VideoCapture(part)  # OpenCV does not report a full disk
        arrived = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if arrived != count:
            raise OutputError(
                f"'{path}' cannot be written: {arrived} of {count} frames arrived. Free space on "
                "the disk, or choose another folder."
            )
        os.replace(part, path)


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Choose ``count`` evenly spaced items, or all if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _line(width: int, *texts: tuple[str, float, float, str]) -> Image.Image:
    """Draw a line of texts (text, x, available width, Pillow's anchor)."""
    line = Image.new("RGB", (width, LINE), "white")
    for text, x, room, anchor in texts:
        text = printable(text, int(room / LETTER))
        size = TEXT * min(1.0, (room - 2 * GAP) / max(1.0, text_font(TEXT).getlength(text)))
        ImageDraw.Draw(line).text((x, LINE / 2), text, "black", text_font(int(size)), anchor)
    return line


def _cells(pictures: Sequence[np.ndarray | None]) -> Image.Image:
    """Pictures side by side, each in the middle of its cell."""
    size, how = (CELL - GAP, CELL - GAP), Image.Resampling.LANCZOS
    fitted = [p if p is None else ImageOps.contain(Image.fromarray(p), size, how) for p in pictures]
    height = GAP + max((picture.height for picture in fitted if picture), default=0)
    row = Image.new("RGB", (CELL * len(pictures), height), "white")
    for place, picture in enumerate(fitted):
        if picture:
            left, top = (CELL - picture.width) // 2, (height - picture.height) // 2
            row.paste(picture, (place * CELL + left, top))
    return row


def _legend_lines(width: int, legend: Sequence[tuple[str, np.ndarray]]) -> Iterator[Image.Image]:
    """Draw names beside their swatches, one in the width of a column."""
    count, beside = width // CELL, SWATCH[0] + 2 * GAP
    for start in range(0, len(legend), count):
        part = list(enumerate(legend[start : start + count]))
        line = _line(width, *((n, i * CELL + beside, CELL - beside, "lm") for i, (n, _) in part))
        for i, (_, swatch) in part:
            place = i * CELL + GAP, (LINE - SWATCH[1]) // 2
            line.paste(Image.fromarray(swatch).resize(SWATCH), place)
        yield line


def _color_bar(width: int, scale: ColorScale) -> Image.Image:
    """Draw a centered color bar between its ends' numbers, the label before."""
    left, right = (width - BAR[0]) // 2, (width + BAR[0]) // 2
    low, high = f"{scale.label}  {scale.low:.3g}", f"{scale.high:.3g}"
    line = _line(width, (low, left - GAP, left, "rm"), (high, right + GAP, left, "lm"))
    colors = scale.colors(np.linspace(scale.low, scale.high, BAR[0])[None].repeat(BAR[1], 0))
    line.paste(Image.fromarray(colors), (left, (LINE - BAR[1]) // 2))
    return line
