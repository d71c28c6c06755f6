"""Drawing: instances, heat maps, marks; grids of pictures; files of pictures and videos."""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from s4m_d2.errors import OutputError, printable
from s4m_d2.files import atomic_write
from s4m_d2.structures import RLEMasks, mask_boxes

READABLE_SIDE = 320  # px; images with a shorter side are enlarged
FILL_ALPHA = 0.45
MOST_NAMED = 60  # instances
MOST_LETTERS = 30  # of a class's name
TEXT_SHARE, MIN_TEXT = 18, 11  # a text's height is a share of the image's, at least 11 px
SHIFTS = (0, -1, 1, -2, 2, -3, 3)  # lines by which a name may be moved to avoid others
LINE_WIDTH = 2  # px: contours, letters' strokes, the white line inside a black one
MARK_SHARE, MIN_MARK = 28, 4  # a mark's radius is a share of the shorter side, at least 4 px
_MOST_DRAWN = 32_766  # px of a side that OpenCV interpolates
GOLDEN_RATIO = 0.618034  # step between hues, which spreads any number of them evenly
FEWEST_COLORS = 12

# Of grids, all in pixels.
CELL = 360  # width of a column; a higher picture is drawn narrower
GAP = 8
LINE = 34  # height of a line of text
TEXT = 16  # size of its letters
LETTER = 9  # width of a letter, about; longer texts are cut, and written smaller if still too long
SWATCH = 38, 24  # width, height
BAR = 140, 16  # of a color bar
CODEC = "mp4v"  # MPEG-4 part 2, which all OpenCV packages can write, unlike H.264

Item = TypeVar("Item")
# A mask inside its box: (h, w) bool, and the box (x0, y0, x1, y1) in the picture.
Window = tuple[np.ndarray, tuple[int, int, int, int]]


def overlay(
    image: np.ndarray,
    masks: np.ndarray | Tensor | RLEMasks,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
) -> np.ndarray:
    """Draw instances on an image: filled, outlined and named, touching ones in different colors.

    More than MOST_NAMED instances are not named; nor is the only class.

    Args:
        image: (H, W, 3) uint8, RGB; returned is (n·H, n·W, 3), with n by :func:`readable_scale`.
        masks: (N, H, W) bool, or encoded.
        labels: N indices into ``class_names``.
        scores: N numbers in [0, 1], written as percentages; None: not written.
    """
    masks = masks if isinstance(masks, RLEMasks) else torch.as_tensor(masks)
    scale = readable_scale(image)
    picture = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    windows = [_window(mask, scale) for mask in masks]
    colors = box_colors(np.array([box for _, box in windows]), picture.shape[:2])
    filled = picture.copy()
    for index in sorted(range(len(windows)), key=lambda i: (-windows[i][0].sum(), -i)):
        mask, (x0, y0, x1, y1) = windows[index]
        filled[y0:y1, x0:x1][mask] = colors[index]
    picture = cv2.addWeighted(picture, 1 - FILL_ALPHA, filled, FILL_ALPHA, 0)
    for (mask, box), color in zip(windows, colors, strict=True):
        lines, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE, offset=box[:2]
        )
        cv2.drawContours(picture, lines, -1, color, LINE_WIDTH)
    if len(windows) > MOST_NAMED:
        return picture
    names = class_names if len(class_names) > 1 else [""]
    texts = [printable(names[label], MOST_LETTERS) for label in labels]
    if scores is not None:
        texts = [f"{text} {score:.0%}".strip() for text, score in zip(texts, scores, strict=True)]
    return _write_names(picture, windows, texts)


def _window(mask: Tensor, scale: int) -> Window:
    x0, y0, x1, y1 = (int(side) for side in mask_boxes(mask[None])[0])
    enlarged = mask[y0:y1, x0:x1].numpy().repeat(scale, 0).repeat(scale, 1)
    return enlarged, (scale * x0, scale * y0, scale * x1, scale * y1)


def readable_scale(image: np.ndarray) -> int:
    """The factor by which an (H, W, 3) picture is enlarged, so that names are readable."""
    return -(-READABLE_SIDE // min(image.shape[:2]))


def deepest_point(mask: np.ndarray) -> tuple[int, int]:
    """The pixel (x, y) farthest inside an (H, W) bool mask."""
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def box_colors(boxes: np.ndarray, image_size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """RGB colors of N boxes (x0, y0, x1, y1) in an image of (H, W), of touching ones different."""
    gap = max(image_size) / 100  # up to which they touch
    starts, ends = np.split(boxes.reshape(-1, 4), 2, axis=1)
    meets = (starts[:, None] <= ends + gap) & (ends[:, None] + gap >= starts)
    touching = np.logical_and.reduce(meets, axis=2)
    palette = _palette(max(FEWEST_COLORS, int(touching.sum(1).max(initial=0))))
    chosen: list[int] = []
    for i in range(len(touching)):
        taken = {chosen[j] for j in np.flatnonzero(touching[i, :i])}
        order = ((i + step) % len(palette) for step in range(len(palette)))
        chosen.append(next(color for color in order if color not in taken))
    return [palette[color] for color in chosen]


def _palette(count: int) -> list[tuple[int, int, int]]:
    """Saturated colors; neighbors in the list differ much in hue, and in brightness."""
    number = np.arange(count)
    value = np.where(number % 2, 1.0, 0.8)
    hsv = np.stack([number * GOLDEN_RATIO % 1, np.full(count, 0.9), value], axis=1)
    return [tuple(color) for color in np.rint(255 * hsv_to_rgb(hsv)).astype(int).tolist()]


@functools.lru_cache
def text_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, ``size`` in px."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _write_names(image: np.ndarray, windows: Sequence[Window], texts: Sequence[str]) -> np.ndarray:
    """Write each text inside its mask, moved up or down to avoid other texts."""
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(MIN_TEXT, height // TEXT_SHARE)
    font = text_font(size)
    stroke: dict[str, Any] = {"stroke_width": LINE_WIDTH, "stroke_fill": "black"}
    written: list[tuple[float, float, float]] = []  # center and half the width of each text
    for i in sorted(range(len(windows)), key=lambda i: -windows[i][0].sum()):
        mask, (left, top, *_) = windows[i]
        if not texts[i] or not mask.any():
            continue
        inside_x, inside_y = deepest_point(mask)
        half = draw.textlength(texts[i], font=font) / 2 + LINE_WIDTH
        x = float(np.clip(left + inside_x, half, max(half, width - half)))
        bottom = max(size, height - size)
        lines = [float(np.clip(top + inside_y + size * step, size, bottom)) for step in SHIFTS]
        free = (
            line
            for line in lines
            if all(abs(line - v) >= size or abs(x - u) >= half + w for u, v, w in written)
        )
        y = next(free, lines[0])
        written.append((x, y, half))
        draw.text((x, y), texts[i], "white", font, "mm", **stroke)
    return np.asarray(picture)


@dataclass(frozen=True)
class ColorScale:
    """A color scale, which several pictures can share."""

    low: float  #: value of the first color, and of all below
    high: float  #: of the last color; above ``low``
    label: str = ""  #: for the color bar

    def colors(self, values: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 RGB of (H, W) numbers."""
        shares = (values - self.low) / (self.high - self.low)
        return matplotlib.colormaps["viridis"](shares, bytes=True)[..., :3]


def heat_map(
    values: np.ndarray,
    size: tuple[int, int],
    scale: ColorScale,
    cells: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draw (rows, columns) numbers, interpolated linearly between the cells' centers.

    Args:
        size: (H, W) of the picture, (H, W, 3) uint8, RGB.
        cells: (rows, columns) that the picture covers, from the upper left corner; default: all.
            Beyond the grid the last ones are repeated.
    """
    rows, columns = cells or values.shape
    drawn = min(size[0], _MOST_DRAWN), min(size[1], _MOST_DRAWN)
    y, x = (
        np.clip((np.arange(n) + 0.5) / n * covered - 0.5, 0, there - 1).astype(np.float32)
        for n, covered, there in zip(drawn, (rows, columns), values.shape, strict=True)
    )
    x, y = np.meshgrid(x, y)
    source = np.asarray(values, dtype=np.float32)
    map_ = cv2.remap(source, x, y, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE)
    return scale.colors(cv2.resize(map_, size[::-1]) if drawn != size else map_)


def mark_point(picture: np.ndarray, point: Sequence[float]) -> np.ndarray:
    """Copy an (H, W, 3) uint8 picture and draw a ring around ``point``, (x, y) in pixels."""
    marked = picture.copy()
    radius = max(MIN_MARK, min(picture.shape[:2]) // MARK_SHARE)
    for level, width in ((0, 2 * LINE_WIDTH), (255, LINE_WIDTH)):
        cv2.circle(marked, tuple(map(int, point)), radius, (level,) * 3, width, cv2.LINE_AA)
    return marked


def outline(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Copy an (n·H, n·W, 3) uint8 picture and draw a line around an (H, W) bool mask."""
    outlined, size = picture.copy(), picture.shape[1::-1]
    large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    lines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for level, width in ((0, 3 * LINE_WIDTH), (255, LINE_WIDTH)):
        cv2.drawContours(outlined, lines, -1, (level,) * 3, width)
    return outlined


@dataclass(frozen=True)
class Panels:
    """A figure of (H, W, 3) uint8 RGB pictures, without columns that have none."""

    columns: Sequence[str]  #: their titles
    rows: Sequence[Sequence[np.ndarray | None]]  #: None: an empty cell
    row_titles: Sequence[str] | None = None  #: a line above each row
    legend: Sequence[tuple[str, np.ndarray]] = ()  #: names and their swatches, below the rows
    scale: ColorScale | None = None  #: of a color bar below the rows
    caption: str = ""  #: a line below everything

    def draw(self) -> np.ndarray:
        """Draw the figure, (H, W, 3) uint8 RGB."""
        used = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        width = CELL * len(used)
        titles = [(self.columns[c], (p + 0.5) * CELL, CELL, "mm") for p, c in enumerate(used)]
        strips = [_line(width, *titles)]
        for number, row in enumerate(self.rows):
            if self.row_titles is not None:
                strips.append(_line(width, (self.row_titles[number], GAP, width, "lm")))
            strips.append(_cells([row[i] for i in used]))
        if self.scale is not None:
            strips.append(_color_bar(width, self.scale))
        strips += _legend_lines(width, self.legend)
        if self.caption:
            strips.append(_line(width, (self.caption, GAP, width, "lm")))
        return np.concatenate([np.asarray(strip) for strip in strips])


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
    """Write an (H, W, 3) uint8 RGB picture as a PNG, atomically; OutputError: it cannot be."""
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format="png")


@contextmanager
def write_video(path: str | os.PathLike[str], fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an MP4 frame by frame, atomically: nothing without a frame, or if the block raises.

    Yields a function that takes (H, W, 3) uint8 RGB frames of one size. The last line of an odd
    side is repeated, as the codec needs even sides. OutputError: this OpenCV has no codec, or the
    disk is full or not the user's.
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
                needed = f"OpenCV with the codec {CODEC} (pip install opencv-python-headless)"
                raise OutputError(f"'{path}' cannot be written: it needs {needed}.")
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
            arrivals = f"{arrived} of {count} frames arrived"
            raise OutputError(f"'{path}' cannot be written: {arrivals}. Free space on the disk.")
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
