"""Predictions as COCO's results, written image by image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

import pycocotools.mask as mask_util
from detectron2.structures import Instances

from s4m_d2.files import atomic_write
from s4m_d2.structures import as_rles

RESULTS = "predictions.json"
IMAGES = "images.json"

Add = Callable[[Mapping[str, Any], Instances], None]


@contextmanager
def write_coco_results(
    folder: str | os.PathLike[str], class_names: Sequence[str], category_ids: Sequence[int]
) -> Iterator[Add]:
    """Write predictions.json, COCO's list of results, and images.json, what its ids mean.

    ``COCO("images.json").loadRes("predictions.json")`` reads both. They appear together when the
    block ends; when it raises, older files stay as they were. Only one image is held at a time.

    Yields a function that takes an image, {"file_name", "height", "width", ...}, which gets the
    next "id" from 1 on, and its Instances with ``pred_masks`` of that size, ``pred_classes`` and
    ``scores``.

    Args:
        folder: of the two files.
        class_names: of the model's classes.
        category_ids: of the same classes, in the data set.

    Raises:
        OutputError: the system refuses to write.
    """
    categories = [
        {"id": number, "name": name} for number, name in zip(category_ids, class_names, strict=True)
    ]
    with (
        atomic_write(os.path.join(folder, IMAGES)) as images_file,
        atomic_write(os.path.join(folder, RESULTS)) as results_file,
    ):
        images, results = _JSONList(images_file), _JSONList(results_file)
        head = f'"info": {{}}, "categories": {json.dumps(categories)}, "annotations": []'
        images_file.write(f'{{{head},\n"images": ')

        def add(image: Mapping[str, Any], instances: Instances) -> None:
            images.add({"id": images.count + 1, **image})
            for result in coco_results(instances, category_ids):
                results.add({"image_id": images.count, **result})

        yield add
        images.close()
        results.close()
        images_file.write("}\n")


def coco_results(instances: Instances, category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Each instance as category_id, segmentation (compressed RLE), bbox (x, y, w, h) and score."""
    rles = as_rles(instances.pred_masks)
    labels, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    for rle, label, score in zip(rles, labels, scores, strict=True):
        size, counts = list(rle["size"]), rle["counts"].decode("ascii")  # json has no bytes
        yield {
            "category_id": category_ids[label],
            "segmentation": {"size": size, "counts": counts},
            "bbox": mask_util.toBbox(rle).tolist(),
            "score": score,
        }


class _JSONList:
    """A list in a file that is being written, an item a line."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.count = 0

    def add(self, item: Mapping[str, Any]) -> None:
        self._file.write(f"{',' if self.count else '['}\n{json.dumps(item)}")
        self.count += 1

    def close(self) -> None:
        self._file.write("\n]\n" if self.count else "[]\n")
