"""Training data of the tiny SAM: views of COCO sets, and composites of icons over photographs."""

import functools
import json
from pathlib import Path

import cv2
import numpy as np
from detectron2.data import transforms as T

from s4m_d2.data.annotations import read_annotations
from s4m_d2.data.images import read_image
from s4m_d2.data.segmentations import transform_masks

SIDE = 256  # px of a view: the model's input
MIN_AREA, MAX_SHARE = 30, 0.8  # px of a view, of the view: what is a target
MIN_WINDOW = 90  # px of an image
WHOLE_CHANCE = 0.4  # else a window
MASKS_DRAWN = 24  # per view: drawing hundreds of outlines takes long
ATTEMPTS = 10

PLAIN_CHANCE = 0.3  # no distortion of color
BLOB_CHANCE, CROWD_CHANCE, OWN_COLOR_CHANCE, BACKDROP_CHANCE = 0.3, 0.45, 0.4, 0.45

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'

View = tuple[np.ndarray, np.ndarray]  # (h, w, 3) uint8 RGB and (M, h, w) bool, the long side 256 px


def load_records(json_file: str, image_root: str) -> tuple[list[str], list[dict], list[dict]]:
    """Classes of a COCO set, its labeled images by name, and their last fifth, which is held out.

    Crowds are left out.
    """
    annotations = read_annotations(json_file, image_root, remedy="Give existing paths.")
    records = [
        {**record, "annotations": [a for a in record["annotations"] if not a["iscrowd"]]}
        for record in annotations.records
    ]
    records = [record for record in records if record["annotations"]]
    records.sort(key=lambda record: record["file_name"])
    trained = len(records) * 4 // 5
    return annotations.classes, records[:trained], records[trained:]


@functools.cache
def cached_image(file_name: str) -> np.ndarray:
    return read_image(file_name, "RGB")


def sample_photograph(records: list[dict], rng: np.random.Generator) -> View:
    """A random image, whole or a window of it, with some of its masks, at least one."""
    while True:
        record = records[rng.integers(len(records))]
        image = cached_image(record["file_name"])
        for _ in range(ATTEMPTS):
            view = _view(image, record["annotations"], rng)
            if len(view[1]):
                return view


def _view(image: np.ndarray, annotations: list[dict], rng: np.random.Generator) -> View:
    height, width = window = image.shape[:2]
    if rng.random() > WHOLE_CHANCE:
        longest = min(window)
        window = (round(np.exp(rng.uniform(*np.log([min(MIN_WINDOW, longest), longest])))),) * 2
    top, left = rng.integers(height - window[0] + 1), rng.integers(width - window[1] + 1)
    size = tuple(max(round(side * SIDE / max(window)), 1) for side in window)
    crop = T.CropTransform(left, top, *window[::-1])
    transforms = T.TransformList([crop, T.ResizeTransform(*window, *size)])
    chosen = rng.permutation(len(annotations))[:MASKS_DRAWN]
    segmentations = [annotations[i]["segmentation"] for i in chosen]
    masks = transform_masks(segmentations, transforms, image.shape[:2], size).numpy()
    return transforms.apply_image(image), targets(masks)


def targets(masks: np.ndarray) -> np.ndarray:
    """Those of (M, h, w) masks that are neither too small nor nearly all of the view."""
    areas = masks.sum(axis=(1, 2))
    return masks[(areas >= MIN_AREA) & (areas < MAX_SHARE * masks[0].size)]


def augment(view: View, rng: np.random.Generator) -> View:
    """Turn, flip and distort the colors of a view."""
    image, masks = view
    if rng.random() < 0.3:
        turns = int(rng.integers(1, 4))
        image, masks = np.rot90(image, turns), np.rot90(masks, turns, axes=(1, 2))
    if rng.random() < 0.5:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
    if rng.random() > PLAIN_CHANCE:
        image = distort(image, rng)
    return np.ascontiguousarray(image), np.ascontiguousarray(masks)


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other colors, tones, sharpness and noise: the same shapes under another camera."""
    pixels = image.astype(np.float32)
    if rng.random() < 0.3:
        pixels = 255 - pixels
    if rng.random() < 0.3:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.3:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    if rng.random() < 0.5:
        pixels = np.clip(pixels * rng.uniform(0.7, 1.3, 3), 0, 255)
    if rng.random() < 0.3:
        pixels = 255 * (np.clip(pixels, 0, 255) / 255) ** np.exp(rng.uniform(-0.8, 0.8))
    pixels = (pixels - 128) * rng.uniform(0.4, 1.4) + 128 + rng.uniform(-50, 50)
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.8))
    if rng.random() < 0.25:
        pixels = pixels + rng.normal(0, rng.uniform(2, 16), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


class Composites:
    """Icons and random blobs, in their colors or in textures of photographs, over photographs.

    ``icon_files``: icons.json of packages ``@iconify-json/...``. Drawing them needs resvg-py.
    """

    def __init__(self, icon_files: list[Path], records: list[dict]) -> None:
        self.records, self.icons = records, []
        for file in icon_files:
            content = json.loads(file.read_text())
            for icon in content["icons"].values():
                size = [icon.get(side, content.get(side, 16)) for side in ("width", "height")]
                box = f'viewBox="0 0 {size[0]} {size[1]}"'
                self.icons.append(f"<svg {NAMESPACES} {box}>{icon['body']}</svg>")

    def sample(self, rng: np.random.Generator) -> View:
        """A scene of few different objects, or a crowd of one kind; later ones hide earlier."""
        canvas, *textures = (self._texture(rng) for _ in range(3))
        if rng.random() < BACKDROP_CHANCE:  # an even ground, dark or light
            canvas = cv2.GaussianBlur(canvas, (0, 0), 20) * rng.uniform(0, 0.5)
            canvas += rng.uniform(0, 128, 3).astype(np.float32)
        crowd = rng.random() < CROWD_CHANCE
        count = round(np.exp(rng.uniform(*np.log([8, 60] if crowd else [2, 14]))))
        size = np.exp(rng.uniform(*np.log([12, 45] if crowd else [40, 110])))
        kind, color, spread = int(rng.integers(1 << 30)), rng.uniform(0, 255, 3), rng.uniform(5, 60)
        blobs, owner = rng.random() < BLOB_CHANCE, np.zeros((SIDE, SIDE), dtype=np.int32)
        opacity = rng.uniform(0.6, 1)
        for number in range(1, count + 1):
            if not crowd:
                kind, color, spread = int(rng.integers(1 << 30)), rng.uniform(0, 255, 3), 0
                blobs = rng.random() < BLOB_CHANCE
            side = round(size * np.exp(rng.normal(0, 0.2 if crowd else 0.5)))
            side = min(max(side, 8), 2 * SIDE)
            patch = blob(rng, side) if blobs else self._icon(kind, side)
            patch = _turned(patch, rng.uniform(-30, 30))
            if blobs or rng.random() > OWN_COLOR_CHANCE:
                texture = textures[number % 2][:side, :side]
                share = rng.uniform(0, 0.6)
                paint = color + rng.normal(0, spread, 3)
                patch[..., :3] = share * cv2.resize(texture, (side, side)) + (1 - share) * paint
            _paste(canvas, owner, patch, number, opacity, rng)
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 1.2))
        masks = owner == np.arange(1, count + 1)[:, None, None]
        return np.clip(canvas, 0, 255).astype(np.uint8), targets(masks)

    def _texture(self, rng: np.random.Generator) -> np.ndarray:
        """(256, 256, 3) float32: a square of a photograph."""
        image = cached_image(self.records[rng.integers(len(self.records))]["file_name"])
        side = int(rng.integers(MIN_WINDOW, min(image.shape[:2]) + 1))
        top, left = (rng.integers(full - side + 1) for full in image.shape[:2])
        square = image[top : top + side, left : left + side]
        return cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)

    def _icon(self, kind: int, side: int) -> np.ndarray:
        """(side, side, 4) float32 RGBA of an icon."""
        import resvg_py

        svg = self.icons[kind % len(self.icons)]
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
        bgra = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
        return cv2.resize(bgra[..., [2, 1, 0, 3]], (side, side)).astype(np.float32)


def blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side, 4) float32 RGBA, black: an ellipse with an uneven outline."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radius = np.ones_like(angles)
    for order in range(2, 6):
        radius += rng.normal(0, 0.15 / order) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
    outline = np.stack([np.cos(angles), rng.uniform(0.5, 1) * np.sin(angles)], axis=1)
    outline *= (radius / radius.max())[:, None] * side / 2 * 0.95
    patch = np.zeros((side, side, 4), np.float32)
    alpha = np.zeros((side, side), np.uint8)
    cv2.fillPoly(alpha, [np.round((outline + side / 2) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    patch[..., 3] = alpha
    return _turned(patch, rng.uniform(0, 360))


def _turned(patch: np.ndarray, degrees: float) -> np.ndarray:
    side = len(patch)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), degrees, 1.0)
    return cv2.warpAffine(patch, turn, (side, side))


def _paste(canvas, owner, patch, number: int, opacity: float, rng: np.random.Generator) -> None:
    """Draw a patch at a random place, perhaps cut off by the border; it then owns its pixels."""
    side = len(patch)
    top, left = rng.integers(-side // 3, SIDE - side * 2 // 3, 2)
    rows, columns = (slice(max(start, 0), min(start + side, SIDE)) for start in (top, left))
    part = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    alpha = part[..., 3:] / 255
    canvas[rows, columns] += alpha * opacity * (part[..., :3] - canvas[rows, columns])
    owner[rows, columns][alpha[..., 0] > 0.5] = number
