"""Toyscapes scenes: deterministic pictures of streets with exact instance labels.

Scene ``index`` of a split is a function of (seed, split, index, size) and of nothing else. The
instance map is what Cityscapes' own tools draw from the scene's polygons, pixel by pixel.
"""

import zlib
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw
from toyscapes_background import Backdrop, draw_backdrop, noise_field
from toyscapes_figures import FIGURES, rider
from toyscapes_parts import Color, Part, jitter, paint_color

LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "vegetation": 21, "sky": 23, "person": 24,
    "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
THING_CLASSES = tuple(FIGURES)
INSTANCES_PER_LABEL = 1000  # Cityscapes: instance id = label id * 1000 + running number

SUPERSAMPLING = 2
SUBPIXEL_BITS = 4
REFERENCE_AREA = 256 * 128
MIN_VISIBLE_SHARE = 0.3  # of a figure inside the image: one hidden further is left out, too
MIN_VISIBLE_AREA = 48  # px at the reference area: an instance hidden further is left out
MIN_INSTANCES, MAX_INSTANCES = 5, 8  # before the hidden ones are left out
SIMILAR_COLOR_CHANCE = 0.4
PAINT_SHARE = 0.8  # how much of a figure is of its one paint; the rest keeps its parts' own colors
OUTLINE_SHARE = 0.8  # how much of a figure's outline is white

# Chance of a scene to hold a class, chance of each further neighbor, range of the ground line's
# distance from the horizon (fraction of the image height), chance to be seen end-on.
_LARGE = {
    "train": (0.85, 0.0, (0.09, 0.2), 0.0),
    "bus": (0.46, 0.3, (0.11, 0.36), 0.35),
    "truck": (0.46, 0.3, (0.11, 0.36), 0.3),
}
_CROWD = {
    "car": (1.0, 0.62, (0.14, 0.48), 0.4),
    "person": (1.0, 0.6, (0.2, 0.6), 0.0),
}
_CYCLES = {"bicycle": (0.55, 0.3, (0.22, 0.58), 0.0), "motorcycle": (0.5, 0.25, (0.22, 0.56), 0.0)}
_TOY_SIZE = {"car": 1.2, "person": 1.4, "bicycle": 1.4, "motorcycle": 1.4}  # against life
_RIDDEN_CHANCE = 0.72
_MAX_GROUP = {"car": 4, "person": 4, "bus": 2, "truck": 2, "bicycle": 3, "motorcycle": 3}
_GROUP_SPACING = (0.6, 0.98)  # of the neighbor's width: below 1 the two overlap


@dataclass(frozen=True)
class SceneObject:
    """A labeled polygon: (K, 2) integer (x, y) pixels, as in Cityscapes' json."""

    label: str
    polygon: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A picture with its labels.

    image: (H, W, 3) uint8 RGB. instance_ids: (H, W) uint16, Cityscapes' instanceIds.
    objects: polygons from far to near, stuff first; drawn in order they give instance_ids.
    """

    image: np.ndarray
    instance_ids: np.ndarray
    objects: list[SceneObject]

    @property
    def label_ids(self) -> np.ndarray:
        """(H, W) uint8, Cityscapes' labelIds."""
        ids = self.instance_ids
        is_thing = ids >= INSTANCES_PER_LABEL
        return np.where(is_thing, ids // INSTANCES_PER_LABEL, ids).astype(np.uint8)


@dataclass(frozen=True)
class _Placement:
    """A figure on the ground: its parts in pixels of the output frame, and its paint."""

    label: str
    parts: list[Part]
    paint: Color
    ground: float
    scale: float


def render_scene(seed: int, split: str, index: int, size: tuple[int, int] = (256, 128)) -> Scene:
    """Draw one scene.

    Args:
        seed, split, index: what the scene is drawn from.
        size: (width, height) in pixels.
    """
    key = [seed, zlib.crc32(split.encode()), index]
    layout_rng, look_rng = np.random.default_rng(key).spawn(2)
    width, height = size
    backdrop = Backdrop.sample(layout_rng, width, height)
    canvas, stuff = draw_backdrop(backdrop, layout_rng, look_rng, SUPERSAMPLING)
    placements = _plan_instances(layout_rng, backdrop)
    min_area = MIN_VISIBLE_AREA * width * height / REFERENCE_AREA
    objects = [SceneObject(label, polygon) for label, polygon in stuff]
    placements, instances = _drop_hidden(placements, (width, height), min_area)
    texture = noise_field(look_rng, *canvas.shape[:2], octaves=(2, 6, 24))
    light = look_rng.uniform(-0.25, 0.25)
    for placement in placements:
        _draw_figure(canvas, placement, texture, light, look_rng)
    objects += instances
    image = _finish(canvas, (width, height), look_rng)
    return Scene(image, draw_instance_ids(objects, (width, height)), objects)


def draw_instance_ids(objects: list[SceneObject], size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint16 instance ids of polygons drawn in order, as Cityscapes' tools draw them."""
    canvas = Image.new("I", size, 0)
    drawer = ImageDraw.Draw(canvas)
    counts = dict.fromkeys(THING_CLASSES, 0)
    for item in objects:
        value = LABEL_IDS[item.label]
        if item.label in counts:
            value = value * INSTANCES_PER_LABEL + counts[item.label]
            counts[item.label] += 1
        drawer.polygon([tuple(point) for point in item.polygon.tolist()], fill=value)
    return np.asarray(canvas).astype(np.uint16)


def _plan_instances(rng: np.random.Generator, backdrop: Backdrop) -> list[_Placement]:
    """Groups of figures on the ground, sorted from far to near."""
    placements: list[_Placement] = []
    for label, (chance, *_rest) in {**_LARGE, **_CYCLES}.items():
        if rng.random() < chance:
            placements += _group(label, rng, backdrop)
    crowd = list(_CROWD)
    rng.shuffle(crowd)
    for label in crowd:
        if len(placements) < MAX_INSTANCES - 1:
            placements += _group(label, rng, backdrop)
    while len(placements) < MIN_INSTANCES:
        placements += _group(crowd[int(rng.integers(len(crowd)))], rng, backdrop)
    placements = placements[:MAX_INSTANCES]
    return sorted(placements, key=lambda p: p.ground)


def _group(label: str, rng: np.random.Generator, backdrop: Backdrop) -> list[_Placement]:
    """One figure, or several of a class side by side; a cycle may carry its rider."""
    _, more, distances, end_on_chance = {**_LARGE, **_CROWD, **_CYCLES}[label]
    count = 1
    while count < _MAX_GROUP.get(label, 1) and rng.random() < more:
        count += 1
    end_on = {"end_on": True} if rng.random() < end_on_chance else {}
    ground = backdrop.horizon + backdrop.height * rng.uniform(*distances)
    center = rng.uniform(0.02, 0.98) * backdrop.width
    direction = rng.choice([-1.0, 1.0])
    similar, base_color = rng.random() < SIMILAR_COLOR_CHANCE, paint_color(label, rng)
    facing, squeeze = rng.choice([-1.0, 1.0]), rng.uniform(0.75, 1.0)
    placements = []
    for _ in range(count):
        y = ground + rng.uniform(-0.012, 0.012) * backdrop.height
        scale = backdrop.pixels_per_meter(y)
        color = jitter(base_color, rng, 20) if similar else paint_color(label, rng)
        flip = facing if rng.random() < 0.75 else -facing
        size = rng.uniform(0.92, 1.12) * _TOY_SIZE.get(label, 1.1)
        figures = [(label, color, FIGURES[label](rng, color, **end_on))]
        if label in _CYCLES and rng.random() < _RIDDEN_CHANCE:
            color = paint_color("rider", rng)
            figures.append(("rider", color, rider(rng, color, on_motorcycle=label == "motorcycle")))
        width = float(np.ptp(np.concatenate([p.points[:, 0] for p in figures[0][2]])))
        stretch = np.array([flip * squeeze * size * scale, -size * scale])
        for order, (name, color, parts) in enumerate(figures):
            moved = [_moved(p, (width / 2, 0.0), stretch, (center, y)) for p in parts]
            placements.append(_Placement(name, moved, color, y + 0.01 * order, scale))
        center += direction * rng.uniform(*_GROUP_SPACING) * width * squeeze * size * scale
    return placements


def _moved(part: Part, origin: tuple, stretch: np.ndarray, target: tuple) -> Part:
    points = (part.points - np.asarray(origin)) * stretch + np.asarray(target)
    return Part(points, part.color, part.opacity, part.solid)


def _drop_hidden(
    placements: list[_Placement], size: tuple[int, int], min_area: float
) -> tuple[list[_Placement], list[SceneObject]]:
    """The placements of which enough is visible, with their outlines."""
    outlined = [(p, _outline(p, size)) for p in placements]
    outlined = [(p, polygon) for p, polygon in outlined if polygon is not None]
    owner = Image.new("I", size, 0)
    drawer = ImageDraw.Draw(owner)
    for number, (_, polygon) in enumerate(outlined, start=1):
        drawer.polygon([tuple(point) for point in polygon.tolist()], fill=number)
    visible = np.bincount(np.asarray(owner).ravel(), minlength=len(outlined) + 1)[1:]
    own = np.array([cv2.contourArea(polygon) for _, polygon in outlined])
    shown = (visible >= min_area) & (visible >= MIN_VISIBLE_SHARE * own)
    kept = [pair for pair, show in zip(outlined, shown, strict=True) if show]
    return [p for p, _ in kept], [SceneObject(p.label, polygon) for p, polygon in kept]


def _outline(placement: _Placement, size: tuple[int, int]) -> np.ndarray | None:
    """(K, 2) outline of the figure's solid parts inside the image, or None if nothing is left."""
    width, height = size
    mask = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    for part in placement.parts:
        if part.solid:
            cv2.fillPoly(mask, [_fixed_point(part.points)], 255, shift=SUBPIXEL_BITS)
    mask = cv2.resize(mask, size, interpolation=cv2.INTER_AREA)
    # An opening by hand: cv2's own, with an even kernel, moves the mask by a pixel.
    solid = cv2.erode((mask > 128).astype(np.uint8), np.ones((2, 2)), anchor=(0, 0))
    solid = cv2.dilate(solid, np.ones((2, 2)), anchor=(1, 1))
    contours = cv2.findContours(solid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    contours = [c[:, 0] for c in contours if len(c) >= 3]
    return max(contours, key=lambda c: cv2.contourArea(c), default=None)


def _fixed_point(points: np.ndarray, offset: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Output-frame points as cv2's fixed-point coordinates of the supersampled canvas."""
    pixels = (points - np.asarray(offset)) * SUPERSAMPLING - 0.5
    return np.round(pixels * (1 << SUBPIXEL_BITS)).astype(np.int32)


def _draw_figure(
    canvas: np.ndarray,
    placement: _Placement,
    texture: np.ndarray,
    light: float,
    rng: np.random.Generator,
) -> None:
    """Paint a figure with shading, texture and a soft contact shadow onto the canvas (float)."""
    points = np.concatenate([p.points for p in placement.parts])
    margin = 0.25 * placement.scale + 2
    height, width = canvas.shape[0] // SUPERSAMPLING, canvas.shape[1] // SUPERSAMPLING
    low = np.maximum(np.floor(points.min(axis=0) - margin), 0).astype(int)
    high = np.minimum(np.ceil(points.max(axis=0) + margin), (width, height)).astype(int)
    if (high <= low).any():
        return
    (x0, y0), (w, h) = low * SUPERSAMPLING, (high - low) * SUPERSAMPLING
    color = np.zeros((h, w, 3), dtype=np.uint8)
    alpha = np.zeros((h, w), dtype=np.uint8)
    for part in placement.parts:
        polygon = [_fixed_point(part.points, tuple(low))]
        cv2.fillPoly(color, polygon, tuple(round(c) for c in part.color), shift=SUBPIXEL_BITS)
        cv2.fillPoly(alpha, polygon, round(255 * part.opacity), shift=SUBPIXEL_BITS)
    patch = canvas[y0 : y0 + h, x0 : x0 + w]
    _cast_shadow(patch, points, placement, low)
    dy, dx = rng.integers(texture.shape[0] - h + 1), rng.integers(texture.shape[1] - w + 1)
    painted = _paint(color, alpha, placement.paint)
    grain = 1 + rng.uniform(0.03, 0.09) * texture[dy : dy + h, dx : dx + w]
    vertical = np.linspace(1.12, 0.84, h)[:, None]
    sideways = np.linspace(1 - light, 1 + light, w)[None, :]
    lit = painted * (grain * vertical * sideways * rng.uniform(0.85, 1.1))[..., None]
    weight = (alpha / 255.0)[..., None]
    patch += weight * (lit - patch)


def _paint(color: np.ndarray, alpha: np.ndarray, paint: Color) -> np.ndarray:
    """Toys are cast in one plastic: parts differ in lightness, and a pale line runs around them."""
    lightness = (color @ np.array([0.3, 0.6, 0.1]) / 160)[..., None]
    painted = (1 - PAINT_SHARE) * color + PAINT_SHARE * (0.35 + 0.65 * lightness) * paint
    inner = cv2.erode(np.pad(alpha, 2), np.ones((3, 3), np.uint8), iterations=2)[2:-2, 2:-2]
    outline = OUTLINE_SHARE * 235.0 + (1 - OUTLINE_SHARE) * np.asarray(paint)
    return np.where((alpha > inner)[..., None], outline, painted)


def _cast_shadow(
    patch: np.ndarray, points: np.ndarray, placement: _Placement, offset: np.ndarray
) -> None:
    """Darken the ground under a figure; the shadow belongs to the ground's label."""
    left, right = points[:, 0].min(), points[:, 0].max()
    center = ((left + right) / 2, placement.ground)
    radii = ((right - left) / 2 + 0.1 * placement.scale, 0.14 * placement.scale + 0.6)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ellipse = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii + center
    shadow = np.zeros(patch.shape[:2], dtype=np.uint8)
    cv2.fillPoly(shadow, [_fixed_point(ellipse, tuple(offset))], 255, shift=SUBPIXEL_BITS)
    patch *= 1 - 0.5 * (cv2.blur(shadow, (3, 3)) / 255.0)[..., None]


def _finish(canvas: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The camera: exposure, white balance, sometimes blur, sensor noise, 8 bits."""
    image = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)
    exposure, contrast = rng.uniform(0.85, 1.12), rng.uniform(0.9, 1.12)
    balance = 1 + rng.uniform(-0.04, 0.04, size=3)
    image = ((image - 120) * contrast + 120) * exposure * balance
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.5) * size[1] / 128)
    image += rng.normal(0.0, rng.uniform(1.0, 4.0), size=image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)
