"""Polygons and colors that the figures of toyscapes are made of."""

import colorsys
from dataclasses import dataclass

import numpy as np

Color = tuple[float, float, float]

BLACK: Color = (28, 28, 32)
TIRE: Color = (36, 36, 40)
RIM: Color = (150, 152, 156)
STEEL: Color = (112, 116, 122)
HEADLIGHT: Color = (246, 236, 180)
TAILLIGHT: Color = (196, 30, 34)
CIRCLE_POINTS = 20
PAINT_HUES = {
    "person": 0.0, "rider": 0.08, "car": 0.6, "truck": 0.42, "bus": 0.15, "train": 0.28,
    "motorcycle": 0.75, "bicycle": 0.9,
}  # fmt: skip
HUE_DEVIATION = 0.06


@dataclass(frozen=True)
class Part:
    """One polygon of a figure: points (K, 2) in meters, RGB color, opacity in [0, 1].

    A part that is not ``solid`` is drawn but does not belong to the instance's mask.
    """

    points: np.ndarray
    color: Color
    opacity: float = 1.0
    solid: bool = True


def random_color(rng: np.random.Generator) -> Color:
    """A paint color: grays and whites are as common on a street as saturated colors."""
    if rng.random() < 0.35:
        gray = rng.uniform(45, 235)
        return (gray, gray + rng.uniform(-4, 4), gray + rng.uniform(-4, 8))
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.35, 0.9), rng.uniform(0.35, 0.95))
    return tuple(255 * channel for channel in rgb)


def paint_color(label: str, rng: np.random.Generator) -> Color:
    """The plastic a toy is cast in: a saturated color, whose hue hints at the class."""
    hue = (PAINT_HUES[label] + rng.normal(0, HUE_DEVIATION)) % 1
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 0.95), rng.uniform(0.45, 1.0))
    return tuple(255 * channel for channel in rgb)


def jitter(color: Color, rng: np.random.Generator, amount: float = 14.0) -> Color:
    """The color moved by up to ``amount`` gray levels per channel."""
    return tuple(float(np.clip(c + rng.uniform(-amount, amount), 8, 250)) for c in color)


def shade(color: Color, factor: float) -> Color:
    """The color made darker (factor < 1) or lighter (factor > 1)."""
    return tuple(float(np.clip(c * factor, 0, 255)) for c in color)


def poly(points: list[tuple[float, float]], color: Color, **kwargs) -> Part:
    """A polygon from a list of points."""
    return Part(np.asarray(points, dtype=np.float64), color, **kwargs)


def box(x0: float, y0: float, x1: float, y1: float, color: Color, **kwargs) -> Part:
    """An axis-aligned rectangle."""
    return poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, **kwargs)


def disc(x: float, y: float, rx: float, color: Color, ry: float | None = None, **kwargs) -> Part:
    """A circle, or with ``ry`` an ellipse."""
    angle = np.linspace(0, 2 * np.pi, CIRCLE_POINTS, endpoint=False)
    ry = rx if ry is None else ry
    points = np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)
    return Part(points, color, **kwargs)


def limb(start: tuple[float, float], end: tuple[float, float], width: float, color: Color) -> Part:
    """A straight bar of some width between two points."""
    a, b = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
    direction = (b - a) / max(float(np.linalg.norm(b - a)), 1e-6)
    side = np.array([-direction[1], direction[0]]) * width / 2
    return Part(np.stack([a + side, b + side, b - side, a - side]), color)


def wheel(x: float, radius: float) -> list[Part]:
    """A tire with its rim, standing on the ground at x."""
    return [disc(x, radius, radius, TIRE), disc(x, radius, 0.55 * radius, RIM)]


def glass_color(rng: np.random.Generator) -> Color:
    """Dark glass, now and then reflecting the sky."""
    return jitter((74, 92, 108) if rng.random() < 0.7 else (150, 176, 196), rng, 16)
