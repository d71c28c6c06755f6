"""COCO's instances, in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pycocotools.mask as mask_util

from s4m_d2.files import atomic_write
from s4m_d2.formats.outlines import are_exact, mask_polygons

FILE = "annotations.json"


def write(
    rows: Callable[[], Iterable[dict]], names: Sequence[str], folder: str, image_root: str
) -> str:
    """Write ``folder``/annotations.json; ids count from 1, file names start below ``image_root``.

    A mask is polygons where these draw exactly it, or else RLE. Each annotation has its "score"
    and, if SAM drew the mask, "sam_iou".
    """
    path = os.path.join(folder, FILE)
    keys = ("file_name", "height", "width")
    images = ({**{k: row[k] for k in keys}, "id": n} for n, row in enumerate(rows(), start=1))
    with atomic_write(path) as file:
        categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
        file.write(f'{{"categories": {json.dumps(categories)},\n"images": [')
        _write_all(file, images)
        file.write('],\n"annotations": [')
        _write_all(file, _annotations(rows()))
        file.write("]}\n")
    return path


def _write_all(file: Any, items: Iterable[dict]) -> None:
    for number, item in enumerate(items):
        file.write((",\n" if number else "\n") + json.dumps(item))


def _annotations(rows: Iterable[dict]) -> Iterator[dict]:
    pairs = ((n, i) for n, row in enumerate(rows, start=1) for i in row["instances"])
    for number, (image_id, instance) in enumerate(pairs, start=1):
        rle = instance["segmentation"]
        polygons = mask_polygons(rle)
        exact = are_exact(polygons, rle)
        yield {
            "id": number,
            "image_id": image_id,
            "category_id": instance["class"] + 1,
            "segmentation": [p.ravel().tolist() for p in polygons] if exact else rle,
            "bbox": mask_util.toBbox(rle).tolist(),
            "area": int(mask_util.area(rle)),
            "iscrowd": 0,
            **{key: instance[key] for key in ("score", "sam_iou") if key in instance},
        }
