"""Figures of the toyscapes generator: the eight thing classes as lists of colored polygons.

A figure is drawn in meters, x to the right and y up from the ground, facing right. Every builder
takes a ``numpy.random.Generator`` and a base color and returns the parts from back to front.
"""

from collections.abc import Callable

import numpy as np
from toyscapes_parts import (
    BLACK,
    HEADLIGHT,
    RIM,
    STEEL,
    TAILLIGHT,
    TIRE,
    Color,
    Part,
    box,
    disc,
    glass_color,
    limb,
    poly,
    random_color,
    shade,
    wheel,
)

SKIN_TONES: tuple[Color, ...] = ((236, 196, 166), (208, 158, 122), (150, 104, 74), (98, 66, 48))
HAIR_TONES: tuple[Color, ...] = ((40, 30, 26), (92, 62, 40), (196, 160, 96), (130, 130, 130))


def car(rng: np.random.Generator, color: Color, end_on: bool = False) -> list[Part]:
    """A car seen from the side (4.2 m) or, ``end_on``, from the front or the back (1.8 m)."""
    if end_on:
        return _car_end(rng, color)
    glass, roof = glass_color(rng), rng.uniform(1.4, 1.62)
    hood, deck = rng.uniform(0.9, 1.4), rng.uniform(3.4, 4.0)
    body = [(0, 0.3), (0, 0.75), (0.15, 0.9), (4.2 - hood, 0.98), (4.05, 0.82), (4.2, 0.6)]
    cabin = [(4.2 - deck, 0.88), (4.5 - deck, roof - 0.08), (0.9, roof), (2.35, roof)]
    parts = [
        poly([*cabin, (4.35 - hood, 0.94)], shade(color, 0.88)),
        poly([*body, (4.2, 0.3)], color),
        box(0, 0.3, 4.2, 0.44, shade(color, 0.6)),
        poly([(4.42 - deck, 0.96), (0.95, roof - 0.1), (1.6, roof - 0.09), (1.6, 0.96)], glass),
        poly([(1.72, 0.96), (1.72, roof - 0.09), (2.28, roof - 0.1), (3.95 - hood, 0.98)], glass),
        box(1.64, 0.46, 1.68, 0.94, shade(color, 0.7)),
        disc(4.1, 0.68, 0.1, HEADLIGHT),
        box(0, 0.62, 0.12, 0.8, TAILLIGHT),
    ]
    return [*parts, *wheel(0.85, 0.34), *wheel(3.35, 0.34)]


def _car_end(rng: np.random.Generator, color: Color) -> list[Part]:
    light = HEADLIGHT if rng.random() < 0.5 else TAILLIGHT
    roof = rng.uniform(1.4, 1.65)
    return [
        box(0.1, 0, 0.42, 0.4, TIRE),
        box(1.38, 0, 1.7, 0.4, TIRE),
        poly(
            [
                (0.1, 0.88),
                (0.32, roof - 0.06),
                (0.5, roof),
                (1.3, roof),
                (1.48, roof - 0.06),
                (1.7, 0.88),
            ],
            shade(color, 0.85),
        ),
        poly([(0, 0.3), (0, 0.75), (0.12, 0.94), (1.68, 0.94), (1.8, 0.75), (1.8, 0.3)], color),
        poly(
            [(0.22, 0.92), (0.42, roof - 0.1), (1.38, roof - 0.1), (1.58, 0.92)], glass_color(rng)
        ),
        box(0.06, 0.22, 1.74, 0.42, shade(color, 0.55)),
        disc(0.25, 0.68, 0.15, light, ry=0.1),
        disc(1.55, 0.68, 0.15, light, ry=0.1),
        box(0.62, 0.46, 1.18, 0.58, (226, 226, 218)),
    ]


def truck(rng: np.random.Generator, color: Color, end_on: bool = False) -> list[Part]:
    """A truck with a cargo box and a separate cab (7 m), or its front (2.5 m)."""
    cargo = random_color(rng) if rng.random() < 0.7 else (220, 220, 214)
    height = rng.uniform(2.9, 3.5)
    if end_on:
        return _truck_front(rng, color, cargo, height)
    parts = [
        box(0, 0.5, 6.6, 0.82, BLACK),
        box(0, 0.8, 5.1, height, cargo),
        *[
            box(x, 0.85, x + 0.07, height - 0.05, shade(cargo, 0.78))
            for x in np.arange(0.4, 5.0, 0.62)
        ],
        box(0, height - 0.12, 5.1, height, shade(cargo, 1.15)),
        poly([(5.25, 0.5), (5.25, 2.55), (6.35, 2.55), (6.85, 1.6), (7.0, 1.5), (7.0, 0.5)], color),
        poly([(5.75, 1.55), (5.75, 2.35), (6.28, 2.35), (6.7, 1.55)], glass_color(rng)),
        box(6.75, 0.8, 7.0, 1.05, HEADLIGHT),
        box(5.25, 0.42, 7.0, 0.6, shade(color, 0.55)),
    ]
    for x in (0.75, 1.7, 5.95):
        parts += wheel(x, 0.5)
    return parts


def _truck_front(rng: np.random.Generator, color: Color, cargo: Color, height: float) -> list[Part]:
    return [
        box(0.15, 0, 0.6, 0.7, TIRE),
        box(1.9, 0, 2.35, 0.7, TIRE),
        box(0, 0.75, 2.5, height, cargo),
        box(0.15, 0.4, 2.35, 2.5, color),
        box(0.3, 1.45, 2.2, 2.3, glass_color(rng)),
        box(0.15, 0.4, 2.35, 0.68, shade(color, 0.5)),
        box(0.75, 0.8, 1.75, 1.25, shade(color, 0.6)),
        disc(0.42, 0.85, 0.16, HEADLIGHT),
        disc(2.08, 0.85, 0.16, HEADLIGHT),
    ]


def bus(rng: np.random.Generator, color: Color, end_on: bool = False) -> list[Part]:
    """A city bus: one body with a row of windows and doors (9.5 m), or its front (2.5 m)."""
    glass, stripe = glass_color(rng), random_color(rng)
    if end_on:
        return [
            box(0.15, 0, 0.55, 0.6, TIRE),
            box(1.95, 0, 2.35, 0.6, TIRE),
            poly([(0, 0.3), (0, 2.8), (0.2, 3.05), (2.3, 3.05), (2.5, 2.8), (2.5, 0.3)], color),
            box(0.15, 1.15, 2.35, 2.45, glass),
            box(1.22, 1.15, 1.28, 2.45, shade(color, 0.5)),
            box(0.4, 2.58, 2.1, 2.9, BLACK),
            box(0.55, 2.66, 1.95, 2.82, (250, 176, 40)),
            box(0, 0.3, 2.5, 0.52, stripe),
            disc(0.35, 0.8, 0.17, HEADLIGHT),
            disc(2.15, 0.8, 0.17, HEADLIGHT),
        ]
    parts = [
        poly([(0, 0.32), (0, 2.85), (0.2, 3.05), (9.2, 3.05), (9.5, 2.6), (9.5, 0.32)], color),
        box(0, 0.95, 9.5, 1.18, stripe),
        box(0, 0.32, 9.5, 0.5, shade(color, 0.6)),
        *[box(x, 1.45, x + 1.05, 2.55, glass) for x in (0.3, 1.5, 2.7, 5.1, 6.3)],
        box(8.75, 1.3, 9.5, 2.6, glass),
        *[box(x, 0.4, x + 0.95, 2.55, shade(glass, 0.75)) for x in (3.95, 7.55)],
        *[box(x + 0.45, 0.4, x + 0.51, 2.55, shade(color, 0.8)) for x in (3.95, 7.55)],
        box(9.3, 0.6, 9.5, 0.85, HEADLIGHT),
    ]
    return [*parts, *wheel(2.0, 0.48), *wheel(7.05, 0.48)]


def train(rng: np.random.Generator, color: Color) -> list[Part]:
    """A tram-like train (16 m): slanted nose, two coupled coaches, low bogies, a pantograph."""
    glass, stripe = glass_color(rng), random_color(rng)
    parts = [
        poly([(0, 0.3), (0, 3.4), (7.8, 3.4), (7.8, 0.3)], color),
        poly([(8.1, 0.3), (8.1, 3.4), (14.6, 3.4), (15.6, 1.9), (16, 0.9), (16, 0.3)], color),
        box(7.7, 0.5, 8.2, 3.15, BLACK),
        box(0, 3.2, 7.8, 3.5, (120, 124, 130)),
        box(8.1, 3.2, 14.6, 3.5, (120, 124, 130)),
        box(0, 1.0, 7.8, 1.4, stripe),
        poly([(8.1, 1.0), (8.1, 1.4), (15.8, 1.4), (15.96, 1.0)], stripe),
        box(0, 1.75, 7.6, 2.8, glass),
        box(8.3, 1.75, 13.6, 2.8, glass),
        *[
            box(x, 1.7, x + 0.12, 2.85, shade(color, 0.9))
            for x in (1.2, 2.5, 3.8, 5.1, 6.4, 9.6, 10.9, 12.2)
        ],
        poly([(14.0, 1.75), (14.0, 2.85), (14.75, 2.85), (15.45, 1.75)], shade(glass, 0.8)),
        limb((3.2, 3.45), (3.9, 4.0), 0.12, BLACK),
        limb((3.9, 4.0), (3.2, 4.4), 0.12, BLACK),
        box(0, 0.12, 16, 0.42, (52, 52, 58)),
        disc(15.75, 0.75, 0.16, HEADLIGHT),
    ]
    for x in (1.2, 2.3, 5.6, 6.7, 9.4, 10.5, 13.4, 14.5):
        parts.append(disc(x, 0.26, 0.26, TIRE))
    return parts


def bicycle(rng: np.random.Generator, color: Color) -> list[Part]:
    """A bicycle seen from the side (1.8 m); one sees through its wheels."""
    parts = []
    for x in (0.36, 1.44):
        parts += [
            disc(x, 0.36, 0.36, (60, 60, 64)),
            disc(x, 0.36, 0.28, (176, 178, 180), opacity=0.9),
            disc(x, 0.36, 0.07, STEEL),
            box(x - 0.015, 0.06, x + 0.015, 0.66, (90, 90, 94)),
            box(x - 0.3, 0.345, x + 0.3, 0.375, (90, 90, 94)),
        ]
    bottom, seat, head = (0.82, 0.34), (0.64, 0.92), (1.28, 0.86)
    parts += [
        limb((0.36, 0.36), bottom, 0.07, color),
        limb((0.36, 0.36), (0.69, 0.76), 0.06, color),
        limb(bottom, seat, 0.08, color),
        limb(bottom, head, 0.09, color),
        limb((0.68, 0.78), head, 0.08, color),
        limb((1.44, 0.36), (1.24, 1.06), 0.07, shade(color, 0.8)),
        limb((1.14, 1.08), (1.36, 1.1), 0.08, BLACK),
        limb((0.5, 0.96), (0.8, 0.94), 0.1, BLACK),
        disc(0.82, 0.34, 0.1, STEEL),
    ]
    return parts


def motorcycle(rng: np.random.Generator, color: Color) -> list[Part]:
    """A motorcycle seen from the side (2.1 m): fat tires, engine, tank, seat, headlight."""
    return [
        disc(0.36, 0.34, 0.34, TIRE),
        disc(0.36, 0.34, 0.15, STEEL),
        disc(1.74, 0.34, 0.34, TIRE),
        disc(1.74, 0.34, 0.15, STEEL),
        limb((1.74, 0.34), (1.42, 1.02), 0.12, STEEL),
        poly(
            [(0.5, 0.3), (0.62, 0.72), (1.4, 0.74), (1.42, 0.36), (1.2, 0.2), (0.7, 0.2)],
            (74, 76, 82),
        ),
        limb((0.15, 0.3), (1.0, 0.26), 0.11, RIM),
        poly([(0.02, 0.78), (0.2, 0.94), (0.62, 0.82), (0.62, 0.62), (0.3, 0.64)], color),
        poly([(0.25, 0.88), (0.3, 0.98), (0.95, 0.9), (0.95, 0.74), (0.6, 0.76)], BLACK),
        poly([(0.84, 0.74), (0.94, 1.0), (1.32, 1.05), (1.48, 0.8), (1.36, 0.66)], color),
        limb((1.2, 1.14), (1.44, 1.04), 0.09, BLACK),
        disc(1.54, 0.94, 0.13, HEADLIGHT),
        poly([(1.42, 0.66), (1.6, 0.76), (2.02, 0.66), (1.98, 0.58), (1.6, 0.66)], color),
    ]


def person(rng: np.random.Generator, color: Color) -> list[Part]:
    """A pedestrian (1.75 m) in some phase of walking, with trousers, a skirt or a coat."""
    skin, hair = (tones[rng.integers(len(tones))] for tones in (SKIN_TONES, HAIR_TONES))
    pants, stride = random_color(rng), rng.uniform(0.02, 0.24)
    arm, swing = shade(color, 0.82), rng.uniform(0.05, 0.22)
    x = 0.35
    parts = [
        limb((x - 0.05, 0.92), (x - stride, 0.06), 0.17, shade(pants, 0.8)),
        limb((x + 0.05, 0.92), (x + stride, 0.06), 0.17, pants),
        box(x - stride - 0.09, 0, x - stride + 0.15, 0.09, BLACK),
        box(x + stride - 0.09, 0, x + stride + 0.15, 0.09, BLACK),
        limb((x - 0.18, 1.38), (x - 0.18 - swing, 0.86), 0.12, arm),
        poly(
            [
                (x - 0.19, 0.84),
                (x - 0.23, 1.4),
                (x - 0.1, 1.47),
                (x + 0.1, 1.47),
                (x + 0.23, 1.4),
                (x + 0.19, 0.84),
            ],
            color,
        ),
        limb((x + 0.18, 1.38), (x + 0.18 + swing, 0.86), 0.12, arm),
        disc(x + 0.18 + swing, 0.84, 0.06, skin),
        limb((x, 1.42), (x, 1.54), 0.12, skin),
        disc(x, 1.64, 0.125, hair, ry=0.145),
        disc(x + 0.03, 1.61, 0.1, skin, ry=0.12),
    ]
    garment = rng.random()
    if garment < 0.2:
        skirt = [(x - 0.18, 0.95), (x + 0.18, 0.95), (x + 0.28, 0.45), (x - 0.28, 0.45)]
        parts.append(poly(skirt, shade(color, 0.9)))
    elif garment < 0.4:
        parts.append(box(x - 0.27, 0.95, x - 0.09, 1.38, random_color(rng)))
    elif garment < 0.6:
        parts.append(box(x - 0.2, 1.08, x + 0.2, 1.2, shade(color, 1.35)))
    return parts


def rider(rng: np.random.Generator, color: Color, *, on_motorcycle: bool = False) -> list[Part]:
    """A rider on the seat of :func:`bicycle` or :func:`motorcycle`, in the vehicle's frame."""
    skin, pants = SKIN_TONES[rng.integers(len(SKIN_TONES))], random_color(rng)
    helmet = random_color(rng)
    hip, knee, foot = ((0.68, 0.98), (1.16, 0.8), (1.0, 0.28))
    shoulder, hand = ((0.9, 1.5), (1.28, 1.1))
    if on_motorcycle:
        hip, knee, foot = ((0.64, 0.98), (1.14, 0.86), (0.92, 0.3))
        shoulder, hand = ((0.86, 1.52), (1.32, 1.1))
    neck = (shoulder[0] + 0.06, shoulder[1] + 0.2)
    lean = np.array([shoulder[0] - hip[0], shoulder[1] - hip[1]])
    side = np.array([-lean[1], lean[0]]) / np.linalg.norm(lean)
    h, s = np.asarray(hip), np.asarray(shoulder)
    torso = [h - 0.17 * side, s - 0.2 * side, s + 0.1 * lean, s + 0.2 * side, h + 0.17 * side]
    return [
        limb(hip, knee, 0.2, pants),
        limb(knee, foot, 0.16, shade(pants, 0.85)),
        box(foot[0] - 0.08, foot[1] - 0.08, foot[0] + 0.18, foot[1] + 0.04, BLACK),
        Part(np.stack(torso), color),
        limb((s[0], s[1] - 0.04), hand, 0.13, shade(color, 0.8)),
        disc(hand[0], hand[1], 0.06, skin),
        disc(neck[0] + 0.03, neck[1] - 0.02, 0.12, BLACK if on_motorcycle else skin, ry=0.14),
        disc(neck[0], neck[1] + 0.05, 0.15, helmet, ry=0.12),
    ]


FIGURES: dict[str, Callable[..., list[Part]]] = {
    figure.__name__: figure
    for figure in (person, rider, car, truck, bus, train, motorcycle, bicycle)
}
