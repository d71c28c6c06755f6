"""Training data of the tiny SAM: a pool of toyscapes scenes, views of them, and clicks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "datasets"))

from toyscapes_scene import INSTANCES_PER_LABEL, render_scene  # noqa: E402

SCENE_SIZE = (256, 128)  # (width, height) of a scene at scale 1
MIN_STUFF_AREA = 120  # px at scale 1: smaller background fragments are no target
STUFF_OFFSET = 40_000  # region ids: instance ids stay, background regions count up from here
TILE_OFFSET = 1 << 17  # keeps the regions of the scenes in a mosaic apart
MIN_TARGET_AREA = 25  # px of the view
CELL = 8  # px of a view between the cells of the auxiliary targets: the encoder's patch size
OFFSET_UNIT = 32.0  # px
CONTENT_SIZES = ((128, 256), (256, 256), (192, 256))  # (H, W) of a view
CONTENT_CHANCES = (0.45, 0.5, 0.05)
PLAIN_VIEW_CHANCE = 0.6  # a whole scene at scale 1, as the method sees it
ZOOM_RANGE = (0.9, 1.5)
STUFF_CHANCE = 0.22
CLICK_COUNTS, CLICK_CHANCES = (1, 2, 3), (0.4, 0.15, 0.45)
SLOPPY_CHANCE, SLOPPY_SIGMA = 0.08, 2.0  # px
NEGATIVE_CHANCE, NEGATIVE_REACH = 0.12, 12  # px around the target's box


@dataclass
class PromptBatch:
    """Views, clicks and targets of one training step; all views have one size.

    images: (B, 3, H, W) float 0..255 RGB. image_index: (N,). points: (N, P, 2) continuous px of
    the view. labels: (N, P). targets: (N, H / 2, W / 2) covered share of each cell. valid: the
    same shape, where the labels are known. cell_regions: (B, H / 8, W / 8) region at each cell's
    center, 0 where unknown. cell_shapes: (B, 4, H / 8, W / 8) from there to the centroid of an
    instance (x, y, in units of 32 px) and the logarithm of its spread (x, y, px); 0 on background.
    """

    images: torch.Tensor
    image_index: torch.Tensor
    points: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    valid: torch.Tensor
    cell_regions: torch.Tensor
    cell_shapes: torch.Tensor


@dataclass
class ScenePool:
    """Rendered scenes: images (h, w, 3) uint8 RGB and region maps (h, w) int32, 0 = no target."""

    images: list[np.ndarray]
    regions: list[np.ndarray]
    scales: list[int]

    @classmethod
    def render(
        cls, seed: int, split: str, count: int, workers: int, scales: tuple[int, ...] = (1, 2)
    ) -> ScenePool:
        """Render scenes 0..count-1 of a split, at the given scales in turn."""
        jobs = [(seed, split, i, scales[i % len(scales)]) for i in range(count)]
        with Pool(workers) as pool:
            scenes = list(tqdm(pool.imap(_render, jobs, chunksize=8), total=count, desc=split))
        images, regions = map(list, zip(*scenes, strict=True))
        return cls(images, regions, [job[-1] for job in jobs])


def _render(job: tuple[int, str, int, int]) -> tuple[np.ndarray, np.ndarray]:
    cv2.setNumThreads(1)
    seed, split, index, scale = job
    width, height = SCENE_SIZE
    scene = render_scene(seed, split, index, (width * scale, height * scale))
    return scene.image, region_map(scene.instance_ids, MIN_STUFF_AREA * scale**2)


def region_map(instance_ids: np.ndarray, min_stuff_area: float) -> np.ndarray:
    """(H, W) int32: instances keep their ids, each connected background region gets its own."""
    regions = np.where(instance_ids >= INSTANCES_PER_LABEL, instance_ids, 0).astype(np.int32)
    next_region = STUFF_OFFSET
    for label in np.unique(instance_ids[instance_ids < INSTANCES_PER_LABEL]):
        mask = (instance_ids == label).astype(np.uint8)
        count, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        for part in range(1, count):
            if stats[part, cv2.CC_STAT_AREA] >= min_stuff_area:
                regions[parts == part] = next_region
                next_region += 1
    return regions


def sample_batch(
    pool: ScenePool, rng: np.random.Generator, images: int, prompts: int
) -> PromptBatch:
    """Random views of the pool's scenes with random clicks on random regions."""
    size = CONTENT_SIZES[rng.choice(len(CONTENT_SIZES), p=CONTENT_CHANCES)]
    clicks = int(rng.choice(CLICK_COUNTS, p=CLICK_CHANCES))
    views, cells, rows = [], [], []
    for number in range(images):
        image, regions = sample_view(pool, rng, size)
        views.append(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
        cells.append(_cell_targets(regions))
        known = _half(regions > 0) > 0.99
        for region in _choose_regions(regions, rng, prompts):
            mask = regions == region
            points, labels = _clicks(mask, rng, clicks)
            rows.append((number, points, labels, _half(mask), known))
    index, points, labels, targets, valid = zip(*rows, strict=True)
    cell_regions, cell_shapes = zip(*cells, strict=True)
    return PromptBatch(
        torch.stack(views).float(),
        torch.tensor(index),
        torch.from_numpy(np.stack(points)).float(),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(targets)),
        torch.from_numpy(np.stack(valid)),
        torch.from_numpy(np.stack(cell_regions)),
        torch.from_numpy(np.stack(cell_shapes)).float(),
    )


def _cell_targets(regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Region (h, w) and shape (4, h, w) of the instance at the center of each encoder cell."""
    ids, inverse = np.unique(regions, return_inverse=True)
    inverse = inverse.reshape(regions.shape)
    ys, xs = np.indices(regions.shape)
    area = np.bincount(inverse.ravel())
    moments = []
    for axis in (xs, ys):
        mean = np.bincount(inverse.ravel(), axis.ravel()) / area
        square = np.bincount(inverse.ravel(), axis.ravel() ** 2) / area
        moments.append((mean, np.sqrt(np.maximum(square - mean**2, 0))))
    center = (slice(CELL // 2, None, CELL), slice(CELL // 2, None, CELL))
    cell = inverse[center]
    (mean_x, spread_x), (mean_y, spread_y) = moments
    shape = np.stack([
        (mean_x[cell] - xs[center]) / OFFSET_UNIT, (mean_y[cell] - ys[center]) / OFFSET_UNIT,
        np.log1p(spread_x[cell]), np.log1p(spread_y[cell]),
    ])  # fmt: skip
    is_instance = (ids > 0) & (ids % TILE_OFFSET < STUFF_OFFSET)
    return regions[center].astype(np.int64), shape * is_instance[cell]


def _half(mask: np.ndarray) -> np.ndarray:
    """(H / 2, W / 2) float32 share of each 2 x 2 cell that a bool mask covers."""
    height, width = mask.shape
    return mask.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3), dtype=np.float32)


def sample_view(
    pool: ScenePool, rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of (a mosaic of) scenes at a random zoom, perhaps flipped, with distorted colors."""
    plain = rng.random() < PLAIN_VIEW_CHANCE
    zoom = 1.0 if plain else float(np.exp(rng.uniform(*np.log(ZOOM_RANGE))))
    window = np.array(size) / zoom  # (H, W) px at scale 1
    tiles = np.ceil(window / np.array(SCENE_SIZE[::-1]) - 1e-6).astype(int)
    image, regions = _mosaic(pool, rng, tuple(tiles), enlarge=zoom > 1)
    scale = image.shape[1] / (SCENE_SIZE[0] * tiles[1])
    window = np.minimum(np.round(window * scale).astype(int), image.shape[:2])
    top, left = (
        int(rng.integers(full - part + 1))
        for full, part in zip(image.shape[:2], window, strict=True)
    )
    crop = (slice(top, top + window[0]), slice(left, left + window[1]))
    image, regions = image[crop], regions[crop]
    if regions.shape != size:
        shrink = window[0] > size[0]
        image = cv2.resize(
            image, size[::-1], interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        regions = cv2.resize(regions, size[::-1], interpolation=cv2.INTER_NEAREST)
    if rng.random() < 0.5:
        image, regions = image[:, ::-1], regions[:, ::-1]
    return distort_color(np.ascontiguousarray(image), rng), np.ascontiguousarray(regions)


def _mosaic(
    pool: ScenePool, rng: np.random.Generator, tiles: tuple[int, int], enlarge: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scenes of one scale side by side; an enlarged view prefers the larger renderings."""
    scales = np.array(pool.scales)
    scale = scales.max() if enlarge else scales.min()
    choice = rng.choice(np.flatnonzero(scales == scale), size=tiles)
    image = np.concatenate(
        [np.concatenate([pool.images[i] for i in row], axis=1) for row in choice]
    )
    offsets = TILE_OFFSET * np.arange(choice.size).reshape(tiles)
    regions = np.concatenate([
        np.concatenate([pool.regions[i] + o * (pool.regions[i] > 0)
                        for i, o in zip(row, shift, strict=True)], axis=1)
        for row, shift in zip(choice, offsets, strict=True)
    ])  # fmt: skip
    return image, regions.astype(np.int32)


def distort_color(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distort mildly as SSD does: brightness, contrast, saturation, hue; each at random."""
    pixels = image.astype(np.float32)
    if rng.random() < 0.5:
        pixels += rng.uniform(-20, 20)
    if rng.random() < 0.5:
        pixels *= rng.uniform(0.75, 1.25)
    pixels = np.clip(pixels, 0, 255)
    hsv = None
    if rng.random() < 0.75:
        hsv = cv2.cvtColor(pixels.astype(np.uint8), cv2.COLOR_RGB2HSV).astype(np.float32)
        hsv[..., 1] *= rng.uniform(0.7, 1.3)
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-18, 18)) % 180
        hsv = np.clip(hsv, 0, 255).astype(np.uint8)
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return pixels.astype(np.uint8)


def _choose_regions(regions: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    ids, areas = np.unique(regions, return_counts=True)
    ids = ids[(ids > 0) & (areas >= MIN_TARGET_AREA)]
    stuff = ids % TILE_OFFSET >= STUFF_OFFSET
    if not len(ids):
        return ids
    share = np.where(
        stuff, STUFF_CHANCE / max(stuff.sum(), 1), (1 - STUFF_CHANCE) / max((~stuff).sum(), 1)
    )
    return rng.choice(ids, size=count, p=share / share.sum())


def _clicks(
    mask: np.ndarray, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(P, 2) points and (P,) labels: uniform in the mask, now and then sloppy or one negative."""
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    pick = rng.integers(len(ys), size=count)
    points = np.stack([xs[pick], ys[pick]], axis=1) + rng.random((count, 2))
    labels = np.ones(count, dtype=np.int64)
    if rng.random() < SLOPPY_CHANCE:
        points += rng.normal(0, SLOPPY_SIGMA, size=points.shape)
    if count > 1 and rng.random() < NEGATIVE_CHANCE:
        x0, x1 = max(xs.min() - NEGATIVE_REACH, 0), xs.max() + NEGATIVE_REACH + 1
        y0, y1 = max(ys.min() - NEGATIVE_REACH, 0), ys.max() + NEGATIVE_REACH + 1
        outside_y, outside_x = np.nonzero(~mask[y0:y1, x0:x1])
        if len(outside_y):
            j = rng.integers(len(outside_y))
            points[-1] = (x0 + outside_x[j] + 0.5, y0 + outside_y[j] + 0.5)
            labels[-1] = 0
    return np.clip(points, 0, (width - 1e-3, height - 1e-3)), labels
