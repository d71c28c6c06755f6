"""CAM-like labels: ground truth corrupted with the failures of class activation maps.

The failures named in SEPL's paper (arXiv 2305.05803):

- ``partial``: an object's activation has a random gain and decreases with the distance from a
  random point of it, so that only a part of it, or nothing, is labeled;
- ``false``: activation leaks from an object to its neighborhood, and there are blobs of the image's
  classes on the background;
- ``blobs``: the map has a coarse grid and smooth noise, so that contours do not follow the object.

There is one activation map per class of the image, divided by its maximum; a pixel gets the class
with the highest activation if that exceeds a threshold, else background. Image-level labels are
known in weakly supervised segmentation: only classes of the image appear.
"""

from collections.abc import Collection

import cv2
import numpy as np

BACKGROUND = 0
VOID = 255
FAILURES = ("partial", "false", "blobs")

THRESHOLD = 0.5  # of a class's maximum
# At strength 1; see the functions.
MIN_GAIN = 0.4  # of an object
FADE = 0.22  # over squared distances in standard deviations of the object
LEAK_CHANCE = 0.7  # of an object
BLOB_CHANCE = 0.5  # of a class
MIN_PEAK, MAX_PEAK = 0.6, 0.98  # of leaks and blobs: below 1, so that none hides a whole object
FALSE_GROWTH = 1.6  # leaks and blobs grow up to the strength 1 / FALSE_GROWTH
RIM = 1.7  # standard deviations: how far from an object's center a leak has its own
LEAK_RADII = (0.6, 1.2)  # standard deviations of the object
BLOB_RADII = (0.04, 0.12)  # of the image's long side
STRIDE = 1 / 16  # of the image's long side: a cell of the grid
NOISE = 0.3  # standard deviation of the factor that is the noise
MIN_FACTOR = 0.1


def cam_label(
    label: np.ndarray,
    rng: np.random.Generator,
    strength: float,
    *,
    instances: np.ndarray | None = None,
    failures: Collection[str] = FAILURES,
) -> np.ndarray:
    """A label as a class activation map would give it.

    The draws do not depend on the strength: with generators of one seed, a stronger label has the
    same failures, larger.

    Args:
        label: (H, W) integers: 0 background, classes from 1; void (255) counts as background.
        rng: freshly seeded: the draws come from its children.
        strength: in [0, 1]; 0 gives the ground truth, 1 is very bad.
        instances: (H, W) integers that tell objects of a class apart; default: connected regions.
        failures: which of ``FAILURES``.

    Returns:
        (H, W) uint8, 0 and classes of ``label``.

    Raises:
        ValueError: a shape, dtype or value is not as expected.
    """
    _check(label, strength, instances, failures)
    classes = [int(c) for c in np.unique(label) if c not in (BACKGROUND, VOID)]
    result = np.zeros(label.shape, dtype=np.uint8)
    best = np.full(label.shape, THRESHOLD)
    for index, stream in zip(classes, rng.spawn(len(classes)), strict=True):
        partial, false, blobs = stream.spawn(len(FAILURES))
        objects = _objects(label == index, instances)
        activation = _partial(objects, partial, strength * ("partial" in failures))
        if "false" in failures:
            others = label != index
            level = min(1.0, FALSE_GROWTH * strength)
            activation = np.maximum(activation, level * _false(objects, others, false))
        if "blobs" in failures:
            activation = _coarse(activation, blobs, strength)
        activation /= activation.max()
        wins = activation > best
        best[wins], result[wins] = activation[wins], index
    return result


def _objects(mask: np.ndarray, instances: np.ndarray | None) -> list[np.ndarray]:
    """(H, W) bool of each object of a class."""
    if instances is None:
        count, instances = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        return [instances == number for number in range(1, count)]
    return [mask & (instances == number) for number in np.unique(instances[mask])]


def _partial(objects: list[np.ndarray], rng: np.random.Generator, strength: float) -> np.ndarray:
    """(H, W) activation in [0, 1]: positive on the objects, 0 elsewhere."""
    activation = np.zeros(objects[0].shape)
    for mask in objects:
        ys, xs = np.nonzero(mask)
        gain, peak = rng.uniform(MIN_GAIN, 1), rng.integers(len(ys))
        distance = ((xs - xs[peak]) / (xs.std() + 1)) ** 2 + ((ys - ys[peak]) / (ys.std() + 1)) ** 2
        activation[mask] = gain**strength * np.exp(-FADE * strength * distance)
    return activation


def _false(objects: list[np.ndarray], others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(H, W) activation in [0, MAX_PEAK] around some of the objects and away from them."""
    activation = np.zeros(others.shape)
    for mask in objects:
        ys, xs = np.nonzero(mask)
        leaks, angle = rng.random() < LEAK_CHANCE, rng.uniform(0, 2 * np.pi)
        spread = np.array([xs.std(), ys.std()])
        center = (xs.mean(), ys.mean()) + RIM * spread * (np.cos(angle), np.sin(angle))
        radii, peak = rng.uniform(*LEAK_RADII, size=2) * (spread + 1), _peak(rng)
        if leaks:
            activation = np.maximum(activation, peak * _bump(others.shape, center, radii))
    ys, xs = np.nonzero(others)
    is_there, place = rng.random() < BLOB_CHANCE, int(rng.random() * len(ys))
    radii, peak = rng.uniform(*BLOB_RADII, size=2) * max(others.shape), _peak(rng)
    if is_there and len(ys):
        center = np.array([xs[place], ys[place]])
        activation = np.maximum(activation, peak * _bump(others.shape, center, radii))
    return activation


def _peak(rng: np.random.Generator) -> float:
    return rng.uniform(MIN_PEAK, MAX_PEAK)


def _bump(size: tuple[int, int], center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """(H, W) Gaussian of height 1; center and radii (x, y) in pixels."""
    ys, xs = np.indices(size)
    squared = ((xs - center[0]) / radii[0]) ** 2 + ((ys - center[1]) / radii[1]) ** 2
    return np.exp(-squared / 2)


def _coarse(activation: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The activation with smooth noise, sampled on a coarse grid and brought back to full size."""
    height, width = activation.shape
    largest = STRIDE * max(height, width)
    noise = rng.normal(size=[int(np.ceil(side / largest)) + 1 for side in (height, width)])
    noise = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    activation = activation * np.maximum(1 + strength * NOISE * noise, MIN_FACTOR)
    cell = strength * largest
    if cell > 1:
        grid = (int(np.ceil(width / cell)), int(np.ceil(height / cell)))
        activation = cv2.resize(activation, grid, interpolation=cv2.INTER_AREA)
        activation = cv2.resize(activation, (width, height), interpolation=cv2.INTER_LINEAR)
    return activation


def _check(
    label: np.ndarray, strength: float, instances: np.ndarray | None, failures: Collection[str]
) -> None:
    if label.ndim != 2 or label.dtype.kind not in "iu":
        raise ValueError(f"label must be (H, W) integers, got shape {label.shape} of {label.dtype}")
    if label.size and not 0 <= label.min() <= label.max() <= VOID:
        raise ValueError(
            f"label has values from {label.min()} to {label.max()}; expected 0 for background, "
            f"classes from 1 and {VOID} for void"
        )
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; expected 0 (ground truth) to 1 (very bad)")
    if instances is not None and instances.shape != label.shape:
        raise ValueError(f"instances have shape {instances.shape}, the label {label.shape}")
    unknown = sorted(set(failures) - set(FAILURES))
    if unknown:
        raise ValueError(f"failures {unknown} are unknown; choose from {', '.join(FAILURES)}")
