"""Small data sets in Cityscapes' and COCO's layout, whose masks equal the color of the figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HEIGHT, WIDTH = 32, 64
RED, GREEN = (200, 40, 40), (40, 200, 40)
PERSON, CAR, GROUP_OF_CARS, ROAD = 24001, 26002, 26, 7


def scene(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and instance ids: a red person, a green car, a group of cars, noise as the ground."""
    rng = np.random.default_rng(index)
    image = rng.integers(90, 110, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ids = np.full((HEIGHT, WIDTH), ROAD, dtype=np.uint16)
    x = 4 + index % 8
    for value, color, rows, columns in (
        (PERSON, RED, slice(4, 20), slice(x, x + 8)),
        (CAR, GREEN, slice(10, 26), slice(x + 8, x + 28)),
    ):
        ids[rows, columns] = value
        image[rows, columns] = color
    ids[28:32, 50:60] = GROUP_OF_CARS
    return image, ids


def coco_content(count: int) -> dict:
    """A polygon and an uncompressed RLE in each image, of the categories 3 and 7."""
    segmentations = {
        3: [[8, 8, 24, 8, 24, 24, 8, 24]],
        7: {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * 5, HEIGHT * (WIDTH - 5)]},
    }
    return {
        "categories": [{"id": 3, "name": "apple"}, {"id": 7, "name": "pear"}],
        "images": [
            {"id": i, "file_name": f"{i:06d}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in range(count)
        ],
        "annotations": [
            {
                "id": 10 * i + category,
                "image_id": i,
                "category_id": category,
                "bbox": [0, 0, 5, HEIGHT],
                "area": 5 * HEIGHT,
                "iscrowd": 0,
                "segmentation": segmentation,
            }
            for i in range(count)
            for category, segmentation in segmentations.items()
        ],
    }


def truncate(path: str | Path) -> None:
    """Keep the first half of a file."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
