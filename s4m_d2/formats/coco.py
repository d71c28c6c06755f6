"""COCO's instances, in one file; masks as polygons."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from s4m_d2.files import atomic_write
from s4m_d2.structures import decode_window


def write(
    rows: Callable[[], Iterable[dict]], names: Sequence[str], folder: str, image_root: str
) -> str:
    """Write ``folder``/annotations.json; ids count from 1, file names start below ``image_root``.

    A mask is polygons where these draw exactly it, or else RLE. Each annotation has its "score"
    and, if SAM drew the mask, "sam_iou".
    """
    path, keys = os.path.join(folder, "annotations.json"), ("file_name", "height", "width")
    images = ({**{k: row[k] for k in keys}, "id": n} for n, row in enumerate(rows(), start=1))
    categories = [{"id": n, "name": name} for n, name in enumerate(names, start=1)]
    with atomic_write(path) as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"images": ')
        write_list(file, images)
        file.write(',\n"annotations": ')
        write_list(file, _annotations(rows()))
        file.write("}\n")
    return path


def write_list(file: IO, items: Iterable[dict]) -> None:
    """Write a list in JSON, an item per line, without holding all of them."""
    file.write("[")
    for number, item in enumerate(items):
        file.write((",\n" if number else "\n") + json.dumps(item))
    file.write("]")


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


def mask_polygons(rle: Mapping[str, Any]) -> list[np.ndarray]:
    """Outlines of a mask's pieces, without their holes, largest first.

    Each has (K, 2) float64 corners (x, y), K >= 4, in px of the image: a quarter of a pixel inside
    the pixels' edges, where COCO's API draws exactly the piece.
    """
    window, x, y = decode_window(rle)
    enlarged = window.repeat(2, axis=0).repeat(2, axis=1)
    found, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    corners = [(piece[:, 0] + 0.5) / 2 + (x, y) for piece in found]
    return sorted(corners, key=lambda piece: -cv2.contourArea(piece.astype(np.float32)))


def are_exact(polygons: list[np.ndarray], rle: Mapping[str, Any]) -> bool:
    """Whether COCO's API draws the mask from these polygons: not one with holes."""
    drawn = mask_util.frPyObjects([piece.ravel().tolist() for piece in polygons], *rle["size"])
    return bool(mask_util.iou([mask_util.merge(drawn)], [rle], [0])[0, 0] == 1.0)
