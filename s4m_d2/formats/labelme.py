"""LabelMe: a json for each image."""

import base64
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from s4m_d2.files import write_json
from s4m_d2.formats.coco import are_exact, mask_polygons
from s4m_d2.structures import decode_window


def write(
    rows: Callable[[], Iterable[dict]], names: Sequence[str], folder: str, image_root: str
) -> str:
    """Write ``folder``/NAME.json for each image, which it names by a relative path.

    Images of one name but for the suffix keep it: NAME.jpg.json. A file that exists is kept, as
    LabelMe saves corrections in place. Pieces of an instance share a "group_id". A mask with holes
    is LabelMe's shape "mask".
    """
    stems = Counter(os.path.splitext(row["file_name"])[0] for row in rows())
    for row in rows():
        stem = os.path.splitext(row["file_name"])[0]
        path = os.path.join(folder, f"{stem if stems[stem] == 1 else row['file_name']}.json")
        if os.path.exists(path):
            continue
        image = os.path.join(image_root, row["file_name"])
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [s for n, i in enumerate(row["instances"]) for s in _shapes(n, i, names)],
            "imagePath": os.path.relpath(image, os.path.dirname(path)),
            "imageData": None,
            "imageHeight": row["height"],
            "imageWidth": row["width"],
        }
        write_json(path, content, indent=1)
    return folder


def _shapes(number: int, instance: Mapping[str, Any], names: Sequence[str]) -> Iterator[dict]:
    rle = instance["segmentation"]
    polygons = mask_polygons(rle)
    of_sam = f", sam_iou {instance['sam_iou']:.3f}" if "sam_iou" in instance else ""
    common = {
        "label": names[instance["class"]],
        "group_id": None,
        "description": f"score {instance['score']:.3f}{of_sam}",
        "flags": {},
        "mask": None,
    }
    if not are_exact(polygons, rle):
        window, x, y = decode_window(rle)
        _, png = cv2.imencode(".png", window * np.uint8(255))
        corners = [[x, y], [x + window.shape[1] - 1, y + window.shape[0] - 1]]
        code = base64.b64encode(png.tobytes()).decode()
        yield {**common, "points": corners, "shape_type": "mask", "mask": code}
        return
    group = number if len(polygons) > 1 else None
    for piece in polygons:
        shape = {"points": piece.tolist(), "shape_type": "polygon", "group_id": group}
        yield {**common, **shape}
