#!/usr/bin/env python
"""Draw a COCO file's annotations on its images, and predictions beside them.

Annotations that cannot be drawn are listed.

    python tools/draw_annotations.py annotations.json --images photos --output annotations.png
    python tools/draw_annotations.py output/data/val.json --images photos --output found.png \\
        --predictions output/student/inference/coco_instances_results.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from s4m_d2.data.annotations import read_annotations  # noqa: E402
from s4m_d2.data.images import read_image  # noqa: E402
from s4m_d2.errors import DatasetError, S4MError  # noqa: E402
from s4m_d2.visualization import overlay, panel_grid  # noqa: E402


def draw(
    json_file: str,
    images: str,
    output: str,
    *,
    predictions: str = "",
    count: int = 4,
    min_score: float = 0.5,
) -> None:
    """Write a PNG with a row for each of ``count`` images at equal distances.

    Args:
        json_file, images: COCO file, and the folder that its file names start from.
        output: the PNG.
        predictions: coco_instances_results.json of an evaluation on ``json_file``.
        count: images, at most.
        min_score: predictions below it are not drawn.

    Raises:
        DatasetError: a file is missing, damaged, or does not fit the others.
    """
    annotations = read_annotations(json_file, images, strict=False)
    for problem in [*annotations.findings.problems(), *annotations.findings.warnings]:
        print(f"not drawn: {problem}", file=sys.stderr)
    content = annotations.to_coco()
    if not content["images"]:
        raise DatasetError(f"{json_file} has no image to draw.")
    truth = COCO()  # which prints when it reads a file itself
    truth.dataset = content
    truth.createIndex()
    found = _predictions(predictions) if predictions else None
    rows, titles = [], []
    for place in np.linspace(0, len(content["images"]) - 1, count).round().astype(int).tolist():
        image = content["images"][place]
        if image["file_name"] in titles:
            continue  # fewer images than asked for
        titles.append(image["file_name"])
        picture = read_image(os.path.join(images, image["file_name"]), "RGB")
        row = [picture, _overlay(truth, picture, truth.imgToAnns[image["id"]])]
        if found is not None:
            of_image = [p for p in found if p["image_id"] == image["id"]]
            shown = [p for p in of_image if p["score"] >= min_score]
            row.append(_overlay(truth, picture, shown, [p["score"] for p in shown]))
        rows.append(row)
    columns = ["image", "annotations"] + (["predictions"] if found is not None else [])
    panel_grid(rows, columns, output, row_titles=titles)


def _predictions(path: str) -> list[dict]:
    try:
        content = json.loads(Path(path).read_text())
        keys = {"image_id", "category_id", "score", "segmentation"}
        if not all(keys <= row.keys() for row in content):
            raise ValueError(f"entries need {', '.join(sorted(keys))}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(
            f"--predictions: {path} cannot be read: {error}. Give a coco_instances_results.json."
        ) from error
    return content


def _overlay(
    truth: COCO, picture: np.ndarray, rows: Sequence[dict], scores: Sequence[float] | None = None
) -> np.ndarray:
    names = {number: row["name"] for number, row in truth.cats.items()}
    order = list(names)
    masks = [truth.annToMask({**row}) for row in rows]
    stacked = np.stack(masks) if masks else np.zeros((0, *picture.shape[:2]))
    labels = [order.index(row["category_id"]) for row in rows]
    return overlay(picture, stacked.astype(bool), labels, list(names.values()), scores)


def main(arguments: Iterable[str] | None = None) -> int:
    """Command line; returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("json_file", help="COCO file")
    parser.add_argument("--images", required=True, help="folder that its file names start from")
    parser.add_argument("--output", required=True, help="the PNG")
    parser.add_argument("--predictions", default="", help="an evaluation's results file")
    parser.add_argument("--count", type=int, default=4, help="images")
    parser.add_argument("--min-score", type=float, default=0.5, help="of predictions drawn")
    args = parser.parse_args(arguments)
    if args.count < 1:
        parser.error(f"--count is {args.count}; expected 1 or more")
    try:
        draw(
            args.json_file,
            args.images,
            args.output,
            predictions=args.predictions,
            count=args.count,
            min_score=args.min_score,
        )
    except S4MError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
