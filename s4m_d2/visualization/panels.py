"""Grids of pictures with titles and a legend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from s4m_d2.errors import InputError, printable
from s4m_d2.files import atomic_write
from s4m_d2.visualization.heat import ColorScale

CELL_WIDTH = 3.0  # inches, as all of the figure's lengths
HIGHEST_CELL = 1.0  # of its width; higher pictures are drawn narrower
CELL_GAP = 0.06
TITLE_HEIGHT = 0.3
ROW_TITLE_HEIGHT = 0.28
LEGEND_LINE = 0.3
LEGEND_MARGIN = 0.1  # above the legend
LEGEND_GAPS = 4  # around a name and between the columns
SWATCH_SIZE = 0.32, 0.2  # width, height
CAPTION_HEIGHT = 0.28
BAR_HEIGHT = 0.6  # of a color bar with its numbers and label
BAR_SIZE = 3.0, 0.14  # width, height of its colors
FONT_SIZE = 10  # points
MOST_LETTERS = 300  # of a text
DPI = 120
MOST_PIXELS = 1 << 16  # of a figure's side, in Matplotlib

Item = TypeVar("Item")


@dataclass(frozen=True)
class Panels:
    """A figure with a titled column for each kind of picture and a row for each image.

    Attributes:
        columns: a title for each picture of a row.
        rows: pictures, (H, W, 3) uint8 RGB; None leaves a cell empty. A column without any is left
            out.
        row_titles: a line above each row; None: none.
        legend: names with the (h, w, 3) uint8 RGB pictures that explain them, below the rows.
        scale: is shown as a color bar below the rows; None: no bar.
        caption: a line below all.

    Raises:
        InputError: there is no picture, a row is not as long as ``columns``, the rows and their
            titles differ in number, or, when it is drawn, the rows are too many for one picture.
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
        """The figure's pixels, (H, W, 3) uint8 RGB."""
        canvas = FigureCanvasAgg(self.figure())
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def figure(self) -> Figure:
        used = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        row_title = ROW_TITLE_HEIGHT if self.row_titles is not None else 0.0
        heights = [_row_height(row) + row_title for row in self.rows]
        figure, width = Figure(dpi=DPI), CELL_WIDTH * len(used)
        FigureCanvasAgg(figure)
        columns = _legend_columns(figure, self.legend, width)
        legend = LEGEND_MARGIN + LEGEND_LINE * -(-len(self.legend) // columns) if self.legend else 0
        bar, caption = BAR_HEIGHT * (self.scale is not None), CAPTION_HEIGHT * bool(self.caption)
        height = TITLE_HEIGHT + sum(heights) + bar + legend + caption
        if height * DPI >= MOST_PIXELS:
            raise InputError(f"{len(self.rows)} rows do not fit into one picture; draw fewer")
        figure.set_size_inches(width, height)
        top = height - TITLE_HEIGHT
        for place, column in enumerate(used):
            x = (place + 0.5) * CELL_WIDTH
            _write(figure, self.columns[column], x, top + TITLE_HEIGHT / 2, "center")
        for number, (row, row_height) in enumerate(zip(self.rows, heights, strict=True)):
            if self.row_titles is not None:
                text = _fitting(figure, self.row_titles[number], width - 2 * CELL_GAP)
                _write(figure, text, CELL_GAP, top - row_title / 2)
            top -= row_height
            for place, column in enumerate(used):
                if (picture := row[column]) is not None:
                    left, up = place * CELL_WIDTH + CELL_GAP / 2, row_height - row_title - CELL_GAP
                    box = left, top + CELL_GAP / 2, CELL_WIDTH - CELL_GAP, up
                    _show(figure, picture, box)
        if self.scale is not None:
            _draw_bar(figure, self.scale, top)
        _draw_legend(figure, self.legend, columns, top - bar - LEGEND_MARGIN)
        if self.caption:
            text = _fitting(figure, self.caption, width - 2 * CELL_GAP)
            _write(figure, text, CELL_GAP, caption / 2)
        return figure


def panel_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    column_titles: Sequence[str],
    path: str | os.PathLike[str],
    row_titles: Sequence[str] | None = None,
    legend: Sequence[tuple[str, np.ndarray]] = (),
) -> None:
    """Write :class:`Panels` as a PNG, which appears when it is complete."""
    write_png(Panels(column_titles, rows, row_titles, legend).draw(), path)


def write_png(picture: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write an (H, W, 3) uint8 RGB picture; it appears when it is complete.

    Raises:
        OutputError: the system refuses to write.
    """
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format="png")


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items, or all if there are fewer."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _row_height(row: Sequence[np.ndarray | None]) -> float:
    shapes = [picture.shape for picture in row if picture is not None]
    highest = max((height / width for height, width, _ in shapes), default=0.0)
    return (CELL_WIDTH - CELL_GAP) * min(highest, HIGHEST_CELL) + CELL_GAP


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Any:
    """Axes in a box (left, bottom, width, height), in inches."""
    width, height = figure.get_size_inches()
    left, bottom, across, up = box
    return figure.add_axes((left / width, bottom / height, across / width, up / height))


def _show(figure: Figure, picture: np.ndarray, box: tuple[float, float, float, float]) -> None:
    """Draw a picture in the middle of a box."""
    cell = _axes(figure, box)
    cell.set_axis_off()
    cell.imshow(picture, interpolation="lanczos")


def _write(figure: Figure, text: str, x: float, y: float, align: str = "left") -> Text:
    """Write a line at a place in inches, from the left and from below."""
    width, height = figure.get_size_inches()
    style: dict[str, Any] = dict(fontsize=FONT_SIZE, ha=align, va="center", parse_math=False)
    return figure.text(x / width, y / height, printable(text, MOST_LETTERS), **style)


def _text_width(figure: Figure, text: str) -> float:
    """In inches."""
    written = _write(figure, text, 0, 0)
    width = written.get_window_extent().width / figure.dpi
    written.remove()
    return width


def _fitting(figure: Figure, text: str, width: float) -> str:
    """The text, its middle left out where it is wider than so many inches."""
    shorter, kept = text, len(text)
    while kept > 2 and _text_width(figure, shorter) > width:
        kept -= 1 + kept // 20
        shorter = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shorter


def _legend_columns(figure: Figure, legend: Sequence[tuple[str, np.ndarray]], width: float) -> int:
    """How many names fit side by side."""
    widest = max((_text_width(figure, name) for name, _ in legend), default=0.0)
    return max(1, int(width / (widest + SWATCH_SIZE[0] + LEGEND_GAPS * CELL_GAP)))


def _draw_legend(
    figure: Figure, legend: Sequence[tuple[str, np.ndarray]], columns: int, top: float
) -> None:
    """Draw names and their pictures below ``top``, in inches."""
    space = figure.get_size_inches()[0] / columns
    across, up = SWATCH_SIZE
    for number, (name, swatch) in enumerate(legend):
        line, column = divmod(number, columns)
        x, y = column * space + CELL_GAP, top - (line + 0.5) * LEGEND_LINE
        _show(figure, swatch, (x, y - up / 2, across, up))
        name = _fitting(figure, name, space - across - LEGEND_GAPS * CELL_GAP)
        _write(figure, name, x + across + CELL_GAP, y)


def _draw_bar(figure: Figure, scale: ColorScale, top: float) -> None:
    """Draw a color bar with numbers and a label in the middle, below ``top``, in inches."""
    width = figure.get_size_inches()[0]
    across, up = min(BAR_SIZE[0], width / 2), BAR_SIZE[1]
    left, bottom = (width - across) / 2, top - 2 * CELL_GAP - up
    bar = _axes(figure, (left, bottom, across, up))
    figure.colorbar(scale.mappable, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=0.8 * FONT_SIZE)
    _write(figure, scale.label, left - CELL_GAP, bottom + up / 2, "right")
