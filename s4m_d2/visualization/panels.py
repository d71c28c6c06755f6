"""Grids of pictures with titles and a legend."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from s4m_d2.errors import InputError, printable
from s4m_d2.files import atomic_write
from s4m_d2.visualization.heat import ColorScale

# All in pixels.
CELL = 360  # width of a column; a higher picture is drawn narrower
GAP = 8
LINE = 34  # height of a line of text
TEXT = 16  # height of its letters
SWATCH = 38, 24  # width, height
BAR = 360, 16  # of a color bar
MOST_TICKS = 5
MOST_LETTERS = 300  # of a text
MOST_PIXELS = 1 << 16  # of a figure's height

Item = TypeVar("Item")


@dataclass(frozen=True)
class Panels:
    """A figure with a titled column for each kind of picture and a row for each image.

    Attributes:
        columns: titles of the columns.
        rows: pictures, (H, W, 3) uint8 RGB; None: an empty cell. Columns without pictures are
            omitted.
        row_titles: a line above each row; None: none.
        legend: names and their (h, w, 3) uint8 RGB swatches, below the rows.
        scale: color bar below the rows; None: none.
        caption: a line below everything.

    Raises:
        InputError: there is no picture, a row differs in length from ``columns``, rows and titles
            differ in number, or (when drawn) there are too many rows for one picture.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[np.ndarray | None]]
    row_titles: Sequence[str] | None = None
    legend: Sequence[tuple[str, np.ndarray]] = ()
    scale: ColorScale | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        empty = all(picture is None for row in self.rows for picture in row)
        if empty or any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(
                f"{len(self.columns)} column titles need rows of as many pictures, "
                f"got {[len(row) for row in self.rows]}"
            )
        if self.row_titles is not None and len(self.row_titles) != len(self.rows):
            raise InputError(
                f"{len(self.rows)} rows need as many titles, got {len(self.row_titles)}"
            )

    def draw(self) -> np.ndarray:
        """Draw the figure, (H, W, 3) uint8 RGB."""
        strips = [np.asarray(strip) for strip in self._strips()]
        if sum(map(len, strips)) > MOST_PIXELS:
            raise InputError(f"{len(self.rows)} rows do not fit into one picture; draw fewer")
        return np.concatenate(strips)

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


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Choose ``count`` evenly spaced items, or all if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


@functools.lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), TEXT)


def _line(width: int, *texts: tuple[str, float, float, str]) -> Image.Image:
    """Draw a line of texts (text, x, available width, Pillow's anchor)."""
    line = Image.new("RGB", (width, LINE), "white")
    for text, x, room, anchor in texts:
        whole = shorter = printable(text, MOST_LETTERS)
        kept = len(whole)
        while kept > 2 and _font().getlength(shorter) > room - 2 * GAP:  # cut the middle
            kept -= 1 + kept // 20
            shorter = f"{whole[: (kept + 1) // 2]}…{whole[len(whole) - kept // 2 :]}"
        ImageDraw.Draw(line).text((x, LINE / 2), shorter, "black", _font(), anchor)
    return line


def _cells(pictures: Sequence[np.ndarray | None]) -> Image.Image:
    """Pictures side by side, each in the middle of its cell."""
    size, how = (CELL - GAP, CELL - GAP), Image.Resampling.LANCZOS
    fitted = {
        place: ImageOps.contain(Image.fromarray(picture), size, how)
        for place, picture in enumerate(pictures)
        if picture is not None
    }
    height = max((picture.height for picture in fitted.values()), default=0) + GAP
    row = Image.new("RGB", (CELL * len(pictures), height), "white")
    for place, picture in fitted.items():
        left, top = (CELL - picture.width) // 2, (height - picture.height) // 2
        row.paste(picture, (place * CELL + left, top))
    return row


def _legend_lines(width: int, legend: Sequence[tuple[str, np.ndarray]]) -> Iterator[Image.Image]:
    """Draw names beside their swatches, as many per line as fit."""
    beside = SWATCH[0] + 2 * GAP
    widest = max((_font().getlength(printable(name)) for name, _ in legend), default=0)
    columns = max(1, int(width / (beside + widest + 2 * GAP)))
    space = width / columns
    for start in range(0, len(legend), columns):
        part = legend[start : start + columns]
        places = [(space * column, *entry) for column, entry in enumerate(part)]
        line = _line(width, *((name, x + beside, space - beside, "lm") for x, name, _ in places))
        for x, _, swatch in places:
            picture = Image.fromarray(swatch).resize(SWATCH)
            line.paste(picture, (round(x) + GAP, (LINE - SWATCH[1]) // 2))
        yield line


def _color_bar(width: int, scale: ColorScale) -> Image.Image:
    """Draw a centered color bar with its label and numbers."""
    across, up = min(BAR[0], width // 2), BAR[1]
    left = (width - across) / 2
    ticks = MaxNLocator(MOST_TICKS, steps=[1, 2, 5, 10]).tick_values(scale.low, scale.high)
    inside = [tick for tick in ticks if scale.low <= tick <= scale.high]
    shares = [(tick - scale.low) / (scale.high - scale.low) for tick in inside]
    numbers = [
        (f"{t:g}", left + s * across, across, "mm") for t, s in zip(inside, shares, strict=True)
    ]
    line = _line(width, (scale.label, left - 2 * GAP, left - GAP, "rm"))
    colors = scale.colors(np.linspace(scale.low, scale.high, across)[None].repeat(up, 0))
    line.paste(Image.fromarray(colors), (round(left), (LINE - up) // 2))
    both = Image.new("RGB", (width, 2 * LINE))
    both.paste(line)
    both.paste(_line(width, *numbers), (0, LINE))
    return both
