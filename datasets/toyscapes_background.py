"""The stage of a toyscapes scene: sky, buildings, trees, sidewalk and road, with their labels."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from toyscapes_parts import Color, jitter, shade

FACADES: tuple[Color, ...] = (
    (168, 142, 120), (186, 172, 150), (140, 100, 84), (128, 132, 138), (196, 188, 176),
    (150, 120, 98), (104, 112, 122),
)  # fmt: skip
SKIES: tuple[tuple[Color, Color], ...] = (
    ((96, 148, 208), (196, 216, 234)),
    ((150, 160, 172), (206, 208, 210)),
    ((110, 120, 160), (238, 190, 150)),
)
FOLIAGE: tuple[Color, ...] = ((70, 104, 52), (92, 120, 50), (58, 90, 66), (130, 118, 52))
SATURATION = 0.5  # of the stage's colors: the toys are the brighter ones
StuffPolygon = tuple[str, np.ndarray]


@dataclass(frozen=True)
class Backdrop:
    """Size of the picture and its perspective: horizon and vanishing point in pixels."""

    width: int
    height: int
    horizon: float
    vanishing_x: float
    camera_height: float  # meters

    @classmethod
    def sample(cls, rng: np.random.Generator, width: int, height: int) -> Backdrop:
        """Draw a camera."""
        return cls(
            width,
            height,
            horizon=height * rng.uniform(0.3, 0.42),
            vanishing_x=width * rng.uniform(0.3, 0.7),
            camera_height=rng.uniform(1.4, 1.9),
        )

    def pixels_per_meter(self, y: float) -> float:
        """Scale of an upright figure that stands on the ground at image row y."""
        return max(y - self.horizon, 1.0) / self.camera_height


def noise_field(
    rng: np.random.Generator, height: int, width: int, octaves: tuple[int, ...]
) -> np.ndarray:
    """(height, width) float32 noise of about unit deviation: a sum of cell sizes in pixels."""
    field = np.zeros((height, width), dtype=np.float32)
    for cell in octaves:
        shape = (height // cell + 2, width // cell + 2)
        coarse = rng.standard_normal(shape, dtype=np.float32)
        field += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return field / np.sqrt(len(octaves))


class _Painter:
    """Fills polygons given in output pixels on a supersampled canvas and records their labels."""

    def __init__(self, backdrop: Backdrop, supersampling: int) -> None:
        shape = (backdrop.height * supersampling, backdrop.width * supersampling, 3)
        self.canvas = np.zeros(shape, dtype=np.float32)
        self.scale = supersampling
        self.size = np.array([backdrop.width, backdrop.height])
        self.stuff: list[StuffPolygon] = []

    def fill(self, points: np.ndarray, color: Color, label: str | None = None) -> None:
        """Fill a polygon; with a label it also becomes an annotation, in whole pixels."""
        points = np.asarray(points, dtype=np.float64)
        if label is not None:
            points = np.clip(np.round(points), 0, self.size - 1).astype(np.int32)
            self.stuff.append((label, points))
            points = points + 0.5 + 0.5 * (points == self.size - 1)
        pixels = np.round(points * self.scale - 0.5).astype(np.int32)
        cv2.fillPoly(self.canvas, [pixels], color)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, color: Color, label: str | None = None
    ) -> None:
        """Fill an axis-aligned rectangle."""
        self.fill(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), color, label)


def draw_backdrop(
    backdrop: Backdrop,
    layout_rng: np.random.Generator,
    look_rng: np.random.Generator,
    supersampling: int,
) -> tuple[np.ndarray, list[StuffPolygon]]:
    """The empty street: float32 (H, W, 3) canvas times the supersampling, and stuff polygons."""
    painter = _Painter(backdrop, supersampling)
    _draw_sky(painter, backdrop, layout_rng, look_rng)
    foot = backdrop.horizon + 0.035 * backdrop.height
    _draw_buildings(painter, backdrop, foot, layout_rng)
    _draw_ground(painter, backdrop, foot, layout_rng)
    for _ in range(int(layout_rng.integers(0, 4))):
        _draw_tree(painter, backdrop, foot, layout_rng)
    height, width = painter.canvas.shape[:2]
    gray = painter.canvas.mean(axis=2, keepdims=True)
    painter.canvas = gray + SATURATION * (painter.canvas - gray)
    grain = noise_field(look_rng, height, width, octaves=(1, 3, 12))
    painter.canvas *= 1 + look_rng.uniform(0.03, 0.08) * grain[..., None]
    return painter.canvas, painter.stuff


def _draw_sky(
    painter: _Painter,
    backdrop: Backdrop,
    layout_rng: np.random.Generator,
    look_rng: np.random.Generator,
) -> None:
    top, bottom = SKIES[layout_rng.integers(len(SKIES))]
    painter.box(0, 0, backdrop.width, backdrop.height, bottom, "sky")
    height, width = painter.canvas.shape[:2]
    rows = np.clip(np.arange(height) / (painter.scale * backdrop.horizon), 0, 1)[:, None, None]
    painter.canvas[:] = (1 - rows) * np.array(top) + rows * np.array(bottom)
    clouds = noise_field(look_rng, height, width, octaves=(24, 60))
    painter.canvas += 26 * np.clip(clouds, 0, 1.5)[..., None]


def _draw_buildings(
    painter: _Painter, backdrop: Backdrop, foot: float, rng: np.random.Generator
) -> None:
    unit = backdrop.height
    x = -0.1 * unit
    while x < backdrop.width:
        width = unit * rng.uniform(0.25, 0.6)
        top = backdrop.horizon - unit * rng.uniform(0.08, 0.4)
        if rng.random() < 0.88:
            _draw_facade(painter, (x, top, x + width, foot), unit, rng)
        x += width + (unit * rng.uniform(0, 0.15) if rng.random() < 0.3 else 0)


def _draw_facade(
    painter: _Painter,
    frame: tuple[float, float, float, float],
    unit: float,
    rng: np.random.Generator,
) -> None:
    x0, y0, x1, y1 = frame
    color = jitter(FACADES[rng.integers(len(FACADES))], rng, 18)
    painter.box(x0, y0, x1, y1, color, "building")
    painter.box(x0, y0, x1, y0 + 0.015 * unit, shade(color, 0.7))
    window = jitter((70, 82, 96) if rng.random() < 0.7 else (214, 196, 130), rng, 14)
    step_x, step_y = unit * rng.uniform(0.05, 0.08), unit * rng.uniform(0.055, 0.085)
    fill_x, fill_y = rng.uniform(0.4, 0.65), rng.uniform(0.45, 0.65)
    for wy in np.arange(y0 + 0.4 * step_y, y1 - step_y, step_y):
        for wx in np.arange(x0 + 0.3 * step_x, x1 - 0.8 * step_x, step_x):
            pane = shade(window, rng.uniform(0.75, 1.25))
            painter.box(wx, wy, wx + fill_x * step_x, wy + fill_y * step_y, pane)


def _draw_ground(
    painter: _Painter, backdrop: Backdrop, foot: float, rng: np.random.Generator
) -> None:
    width, height, vx = backdrop.width, backdrop.height, backdrop.vanishing_x
    paving = jitter(shade((158, 151, 143), rng.uniform(0.85, 1.15)), rng, 7)
    painter.box(0, foot, width, height, paving, "sidewalk")
    depth = height - backdrop.horizon
    for fraction in (0.07, 0.11, 0.17, 0.26, 0.4, 0.6, 0.85):
        y = backdrop.horizon + fraction * depth
        painter.box(0, y, width, y + 0.012 * height * fraction + 0.3, shade(paving, 0.86))
    half_far, half_near = rng.uniform(0.2, 0.4) * width, rng.uniform(0.75, 1.3) * width
    far = foot + 0.02 * height

    def across(y: float, side: float) -> float:
        t = (y - far) / (height - far)
        return vx + side * ((1 - t) * half_far + t * half_near)

    def strip(y0: float, y1: float, a: float, b: float) -> np.ndarray:
        x0a, x0b, x1b, x1a = across(y0, a), across(y0, b), across(y1, b), across(y1, a)
        return np.array([(x0a, y0), (x0b, y0), (x1b, y1), (x1a, y1)])

    asphalt = jitter(shade((94, 94, 99), rng.uniform(0.75, 1.25)), rng, 5)
    curb = strip(far, height, -1.03, 1.03)
    painter.fill(curb, shade(paving, 1.2))
    painter.fill(_clip_to_width(strip(far, height, -1, 1), width), asphalt, "road")
    paint = jitter((214, 212, 200), rng, 12)
    for lane in (-0.33, 0.33):
        for y in far + (height - far) * np.linspace(0, 1, 9)[:-1] ** 1.6:
            dash_end = y + 0.25 * (y - backdrop.horizon)
            painter.fill(strip(y, dash_end, lane - 0.008, lane + 0.008), paint)


def _clip_to_width(trapezoid: np.ndarray, width: int) -> np.ndarray:
    """The part of a symmetric road trapezoid (far, far, near, near) inside the picture."""
    (xl0, y0), (xr0, _), (xr1, y1), (xl1, _) = trapezoid

    def crossing(x0: float, x1: float, border: float) -> float:
        return y0 + (border - x0) / (x1 - x0) * (y1 - y0)

    right, left = [(xr0, y0)], [(xl0, y0)]
    right += [(width, crossing(xr0, xr1, width)), (width, y1)] if xr1 > width else [(xr1, y1)]
    left += [(0, crossing(xl0, xl1, 0)), (0, y1)] if xl1 < 0 else [(xl1, y1)]
    return np.array(right + left[::-1])


def _draw_tree(
    painter: _Painter, backdrop: Backdrop, foot: float, rng: np.random.Generator
) -> None:
    unit = backdrop.height
    x, base = rng.uniform(0, 1) * backdrop.width, foot + unit * rng.uniform(0.0, 0.04)
    tall = unit * rng.uniform(0.22, 0.36)
    leaf = jitter(FOLIAGE[rng.integers(len(FOLIAGE))], rng, 12)
    trunk = 0.012 * unit
    painter.box(x - trunk, base - 0.5 * tall, x + trunk, base, (88, 66, 50), "vegetation")
    angle = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    wobble = 1 + rng.uniform(-0.14, 0.14, size=angle.size)
    radius = np.stack([0.3 * tall * wobble, 0.36 * tall * wobble], axis=1)
    crown = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + (x, base - 0.66 * tall)
    painter.fill(crown, leaf, "vegetation")
    for _ in range(14):
        spot = rng.normal(0, 0.1 * tall, size=2) + (x, base - 0.68 * tall)
        blob = spot + 0.07 * tall * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        painter.fill(blob, shade(leaf, rng.uniform(0.78, 1.25)))
