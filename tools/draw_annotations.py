#!/usr/bin/env python
"""Draw a COCO file's annotations on its images, and predictions beside them.

Annotations that cannot be drawn are listed.

    python tools/draw_annotations.py annotations.json --images photos --output annotations.png
    python tools/draw_annotations.py output/data/val.json --images photos --output found.png \\
        --predictions output/student/inference/coco_instances_results.json
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from s4m_d2.data.annotations import read_annotations
from s4m_d2.data.images import check_size, read_image
from s4m_d2.engine.command.arguments import command_parser, positive
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import DatasetError
from s4m_d2.visualization import evenly_spaced, overlay, panel_grid

MIN_SCORE = 0.5  # of predictions drawn


def draw(args: argparse.Namespace) -> None:
    """Write a PNG with a row for each of ``args.count`` images at equal distances."""
    annotations = read_annotations(args.json_file, args.images, strict=False)
    for problem in [*annotations.findings.problems(), *annotations.findings.warnings]:
        print(f"not drawn: {problem}", file=sys.stderr)
    truth = COCO()  # which prints when it reads a file itself
    truth.dataset = annotations.to_coco()
    truth.createIndex()
    chosen = evenly_spaced(truth.dataset["images"], args.count)
    found = _predictions(args.predictions) if args.predictions else None
    rows, titles = [], []
    for image in chosen:
        path = os.path.join(args.images, image["file_name"])
        try:
            picture = read_image(path, "RGB")
            check_size({**image, "file_name": path}, picture.shape[:2])
        except DatasetError as error:
            print(f"not drawn: {error}", file=sys.stderr)
            continue
        titles.append(image["file_name"])
        rows.append([picture, _overlay(truth, picture, truth.imgToAnns[image["id"]])])
        if found is not None:
            of_image = [p for p in found if p["image_id"] == image["id"]]
            shown = [p for p in of_image if p["score"] >= MIN_SCORE]
            rows[-1].append(_overlay(truth, picture, shown, [p["score"] for p in shown]))
    if not rows:
        raise DatasetError(f"{args.json_file} has no image that can be drawn.")
    columns = ["image", "annotations"] + ["predictions"] * (found is not None)
    panel_grid(rows, columns, args.output, row_titles=titles)
    print(args.output)


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


@exit_status
def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("json_file", help="COCO file")
    parser.add_argument("--images", required=True, help="folder that its file names start from")
    parser.add_argument("--output", required=True, help="the PNG")
    parser.add_argument("--predictions", default="", help="an evaluation's results file")
    parser.add_argument("--count", type=positive, default=4, help="images")
    draw(parser.parse_args(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
