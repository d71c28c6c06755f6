"""A line chart as SVG text: no library, no script, one text for every screen and theme.

Colors are classes of the page's style sheet (``c0`` to ``c5``). A column under the pointer shows
its values.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from s4m_d2.errors import MOST_SHOWN, printable
from s4m_d2.report.curves import Point

WIDTH, HEIGHT = 460, 240  # of the picture, in its own units, as all lengths here
LEFT, RIGHT, TOP, BOTTOM = 60, 18, 38, 40  # margins of the plot
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
COLORS = 6
X_TICKS, Y_TICKS = 5, 5
MOST_DOTS = 60  # points; a curve of more is a line alone
READOUT_LETTERS = 58  # a line
NEAR_ZERO, NEAR_TICK = 0.5, 0.02  # shares of the range of iterations
ROUNDING = 1e-9  # relative; values that differ by no more are the same
LABEL_SIDE = 0.7  # of the plot; a mark beyond it has its label on the left
GROUPED = 10_000  # from here on, thousands of ticks are set apart


def escape(text: str, most: int = MOST_SHOWN) -> str:
    """A text of a run in one line of HTML, shortened to ``most`` characters."""
    return html.escape(printable(text, most))


@dataclass(frozen=True)
class Series:
    """A named curve; a band shows the least and greatest value where a point is of several."""

    name: str
    points: Sequence[Point]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A named vertical line."""

    iteration: float
    text: str


@dataclass(frozen=True)
class Axes:
    """Ranges of the data, and where they are in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at_x(self, iteration: float) -> float:
        return LEFT + PLOT_WIDTH * (iteration - self.x[0]) / (self.x[1] - self.x[0])

    def at_y(self, value: float) -> float:
        return TOP + PLOT_HEIGHT * (self.y[1] - value) / (self.y[1] - self.y[0])


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    from_zero: bool = True,
) -> str:
    """The chart as an ``<svg>`` element; texts are escaped here.

    Args:
        unit: of the values.
        marks: those within the range of the data are drawn.
        from_zero: the axis of values includes 0.
    """
    axes = fitted(series, from_zero=from_zero)
    inside = [mark for mark in marks if axes.x[0] <= mark.iteration <= axes.x[1]]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><desc>{escape(_described(unit, series))}</desc>",
        f'<text class="unit" x="{LEFT}" y="{TOP - 22}">{escape(unit)}</text>',
        *_grid(axes),
        *(_mark(axes, mark) for mark in inside),
        *(_band(axes, one) for one in series),
        *(_line(axes, one) for one in series),
        *(_bad(axes, one) for one in series),
        *_columns(axes, series),
        "</svg>",
    ]
    return "".join(parts)


def fitted(series: Sequence[Series], *, from_zero: bool = True) -> Axes:
    """Axes that hold all finite values, with round limits of the values."""
    points = [point for one in series for point in one.points]
    x = [float(i) for point in points for i in point.iteration] or [0.0]
    y = [v for point in points for v in (point.low, point.high) if math.isfinite(v)]
    low, high = (min(y), max(y)) if y else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    left, right = _widened(min(x), max(x))
    if high - low <= ROUNDING * max(abs(low), abs(high)):  # one value, 0 among them
        low, high = (low - abs(low), high + abs(high)) if low else (0.0, 1.0)
    step = tick_step(high - low, Y_TICKS)
    return Axes((left, right), (math.floor(low / step) * step, math.ceil(high / step) * step))


def _widened(first: float, last: float) -> tuple[float, float]:
    """The range of iterations: from 0 on, and to a tick, where that is near."""
    if first == last:
        return first - 1, last + 1
    left = 0.0 if 0 <= first <= NEAR_ZERO * last else first
    step = tick_step(last - left, X_TICKS)
    above = math.ceil(last / step) * step
    return left, (above if above - last <= NEAR_TICK * (last - left) else last)


def tick_step(span: float, most: int) -> float:
    """A step of 1, 2 or 5 times a power of ten, so that about ``most`` steps make the span.

    >>> tick_step(100, 5), tick_step(0.7, 5)
    (20.0, 0.2)
    """
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 and math.isfinite(raw) else 1.0
    factor = next((f for f in (1, 2, 5) if f * power >= raw * (1 - 1e-9)), 10)
    return float(f"{factor * power:.12g}")


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values from ``low`` to ``high``."""
    step = tick_step(high - low, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def number(value: float, digits: int = 4) -> str:
    """A number for people.

    >>> number(0.123456), number(12345.6), number(250000.0), number(float("nan"))
    ('0.1235', '12,346', '250,000', '–')
    """
    if not math.isfinite(value):
        return "–"
    if GROUPED <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def short(iteration: float) -> str:
    """An iteration on the axis.

    >>> short(800.0), short(90_000.0), short(2_500_000.0)
    ('800', '90k', '2.5M')
    """
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if iteration >= 10 * size or iteration >= size == 1e6:
            return f"{iteration / size:g}{unit}"
    return f"{iteration:,.0f}"


def _grid(axes: Axes) -> list[str]:
    parts = []
    for value in ticks(*axes.y, Y_TICKS):
        y = axes.at_y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{PLOT_WIDTH}"/>')
        parts.append(f'<text class="yt" x="{LEFT - 6}" y="{y + 4:.1f}">{number(value)}</text>')
    bottom = HEIGHT - BOTTOM
    for value in ticks(*axes.x, X_TICKS):
        if value != int(value) or value < 0:
            continue
        x = axes.at_x(value)
        parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text class="xt" x="{x:.1f}" y="{bottom + 17}">{short(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}h{PLOT_WIDTH}"/>')
    middle = LEFT + PLOT_WIDTH / 2
    parts.append(f'<text class="xt" x="{middle:g}" y="{HEIGHT - 6}">iteration</text>')
    return parts


def _mark(axes: Axes, mark: Mark) -> str:
    x = axes.at_x(mark.iteration)
    left = x > LEFT + LABEL_SIDE * PLOT_WIDTH
    at, end = (x + 4, ' text-anchor="end"') if left else (x - 4, "")
    return (
        f'<path class="mark" d="M{x:.1f} {TOP - 3}V{HEIGHT - BOTTOM}"/>'
        f'<text class="marktext" x="{at:.1f}" y="{TOP - 7}"{end}>{escape(mark.text)}</text>'
    )


def _finite(one: Series) -> list[Point]:
    return [point for point in one.points if math.isfinite(point.mean)]


def _line(axes: Axes, one: Series) -> str:
    points = _finite(one)
    places = [(axes.at_x(p.middle), axes.at_y(p.mean)) for p in points]
    path = " ".join(f"{x:.1f} {y:.1f}" for x, y in places)
    style = f"line c{one.color % COLORS}" + " dashed" * one.dashed
    parts = [f'<path class="{style}" d="M{path}"/>'] if len(points) > 1 else []
    if len(points) <= MOST_DOTS:
        parts += [
            f'<circle class="dot c{one.color % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
            for x, y in places
        ]
    return "".join(parts)


def _band(axes: Axes, one: Series) -> str:
    points = _finite(one)
    if all(point.low == point.high for point in points):
        return ""
    upper = [f"{axes.at_x(p.middle):.1f} {axes.at_y(p.high):.1f}" for p in points]
    lower = [f"{axes.at_x(p.middle):.1f} {axes.at_y(p.low):.1f}" for p in reversed(points)]
    return f'<path class="band c{one.color % COLORS}" d="M{" ".join(upper + lower)}Z"/>'


def _bad(axes: Axes, one: Series) -> str:
    """A cross at the top of the plot where values are not finite."""
    return "".join(
        f'<path class="bad" d="M{axes.at_x(p.middle) - 4:.1f} {TOP + 2}l8 8m0 -8l-8 8">'
        f"<title>{escape(one.name)}: {p.bad} not finite</title></path>"
        for p in one.points
        if p.bad
    )


def _columns(axes: Axes, series: Sequence[Series]) -> list[str]:
    """An invisible column for each place that has points; pointed at, it shows their values."""
    at: dict[tuple[int, int], list[tuple[Series, Point]]] = {}
    for one in series:
        for point in one.points:
            at.setdefault(point.iteration, []).append((one, point))
    places = sorted(at, key=sum)
    xs = [axes.at_x(sum(place) / 2) for place in places]
    edges = [LEFT, *((a + b) / 2 for a, b in zip(xs, xs[1:], strict=False)), WIDTH - RIGHT]
    parts = []
    for i, place in enumerate(places):
        width = max(edges[i + 1] - edges[i], 0.5)
        parts.append(
            f'<g class="h"><rect x="{edges[i]:.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{PLOT_HEIGHT}"/><path d="M{xs[i]:.1f} {TOP}v{PLOT_HEIGHT}"/>'
            f"{_readout(place, at[place])}</g>"
        )
    return parts


def _readout(place: tuple[int, int], items: Sequence[tuple[Series, Point]]) -> str:
    first, last = place
    words = [f"iteration {first:,}" if first == last else f"iterations {first:,}–{last:,}"]
    for one, point in items:
        words.append(f"{one.name} {number(point.mean)}" + " (not finite)" * bool(point.bad))
    lines = [""]
    for word in words:
        joined = f"{lines[-1]} · {word}" if lines[-1] else word
        if lines[-1] and len(joined) > READOUT_LETTERS and len(lines) < 2:
            lines.append(word)
        else:
            lines[-1] = joined
    lines = [x if len(x) <= READOUT_LETTERS else f"{x[: READOUT_LETTERS - 1]}…" for x in lines]
    ys = (TOP - 22, TOP - 8)[: len(lines)]
    return "".join(
        f'<text x="{LEFT}" y="{y}">{escape(line)}</text>' for y, line in zip(ys, lines, strict=True)
    )


def _described(unit: str, series: Sequence[Series]) -> str:
    """The chart in words."""
    parts = []
    for one in series:
        if points := _finite(one):
            least, most = min(p.low for p in points), max(p.high for p in points)
            parts.append(
                f"{one.name} from {number(points[0].mean)} to {number(points[-1].mean)}, "
                f"least {number(least)}, greatest {number(most)}"
            )
        else:
            parts.append(f"{one.name}: no finite value")
    return f"{unit}: " + "; ".join(parts)
