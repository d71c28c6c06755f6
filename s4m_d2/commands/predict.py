"""Run a checkpoint on images, folders and videos; write overlays and COCO's results.

    python tools/demo.py --config-file configs/cityscapes_10pct.yaml \
        --weights output/student/model_final.pth --input photo.jpg drive.mp4 --output output/demo
    python tools/demo.py --config-file configs/toyscapes_10pct.yaml --model teacher \
        --weights output/quickstart/student/model_final.pth \
        --input datasets/toyscapes/leftImg8bit/val --output output/demo MODEL.DEVICE cpu
    s4m-predict --weights output/own --tile 512 --input slide.png --output output/demo

Writes overlays/ (a PNG for each image, an MP4 for each video, under the names of the inputs),
predictions.json (COCO's list of results), and images.json (its images and categories). No data set
is needed. Unreadable files are listed at the end, and the exit status is then 1.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from tqdm import tqdm

from s4m_d2.data.images import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Video, list_images, read_image
from s4m_d2.engine.command.arguments import (
    model_config,
    model_parser,
    natural,
    print_problems,
    share,
    split_overrides,
)
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.figures.predictor import Predictor, class_names, load_model
from s4m_d2.engine.stages import last_weights
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.files import write_json
from s4m_d2.structures import as_rles, plain_rle
from s4m_d2.visualization import overlay, write_png, write_video


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 all done, 1 an error, or files that cannot be read."""
    words, overrides = split_overrides(arguments)
    parser = model_parser(__doc__, model="student", required=True)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH")
    add("--output", required=True, metavar="DIR")
    add("--score", type=share, default=0.5, help="least score of an instance (default: 0.5)")
    add("--tile", type=natural, metavar="PX",
        help="side of the tiles that an image is cut into, 0: none (default: INPUT.TILE.SIZE)",
    )  # fmt: skip
    add("--overlap", type=share,
        help="minimum overlap of neighboring tiles, as a share of the side (default: 0.2)",
    )  # fmt: skip
    add("--force", action="store_true", help="replace what --output holds")
    return run(parser.parse_args(words), overrides)


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Predict on all inputs and write the results; after an error these are as they were."""
    args.weights = last_weights(args.weights)
    for key, value in (("SIZE", args.tile), ("OVERLAP", args.overlap)):
        overrides += [] if value is None else [f"INPUT.TILE.{key}", str(value)]
    cfg = model_config(args.config_file, args.weights, overrides)
    results, overlays = (os.path.join(args.output, x) for x in ("predictions.json", "overlays"))
    if os.path.exists(results) and not args.force:
        raise ConfigError(f"The output '{results}' exists. Add --force to replace it.")
    names = class_names(cfg, args.class_names)
    media, problems = find_media(args.input, exclude=overlays)
    model, _ = load_model(cfg, args.weights, args.model)
    predict, outputs, ids = Predictor(cfg, model), output_names(media), category_ids(cfg)
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def look(image: np.ndarray, **about: Any) -> np.ndarray:
        of_image, (height, width) = predict(image, args.score), image.shape[:2]
        images.append({"id": len(images) + 1, **about, "height": height, "width": width})
        found.extend(coco_results(of_image, len(images), ids))
        labels, scores = of_image.pred_classes.tolist(), of_image.scores.tolist()
        return overlay(image, of_image.pred_masks, labels, names, scores)

    for path in tqdm(media, unit="file", disable=None):
        try:
            _draw(path, os.path.join(overlays, outputs[path]), look)
        except DatasetError as error:
            problems[path] = str(error)
    content = {"info": {}, "images": images, "categories": categories, "annotations": []}
    write_json(os.path.join(args.output, "images.json"), content)
    write_json(results, found)
    print(f"{len(images):,} images, {len(found):,} instances: {args.output}")
    return print_problems(problems, "cannot be used")


def coco_results(instances: Instances, image_id: int, ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO's results of one image, with the masks' boxes; ``ids`` are those of the categories."""
    labels, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    return [
        {
            "image_id": image_id,
            "category_id": ids[label],
            "segmentation": plain_rle(rle),
            "bbox": mask_util.toBbox(rle).tolist(),
            "score": score,
        }
        for rle, label, score in zip(as_rles(instances.pred_masks), labels, scores, strict=True)
    ]


def _draw(path: str, output: str, look: Callable[..., np.ndarray]) -> None:
    """Predict on one file and write ``output``.png or .mp4; DatasetError: it cannot be read.

    Of a video that cannot be read to its end, the frames before are results.
    """
    if not path.lower().endswith(VIDEO_EXTENSIONS):
        write_png(look(read_image(path, "RGB"), file_name=path), f"{output}.png")
        return
    video, problem = Video(path), None
    with write_video(f"{output}.mp4", video.fps) as write:
        try:
            frames = tqdm(video, total=video.announced, unit="frame", leave=False, disable=None)
            for index, frame in enumerate(frames):
                write(look(frame, file_name=path, frame=index))
        except DatasetError as error:  # what was drawn is kept
            problem = error
    if problem is not None:
        raise problem


def find_media(inputs: Sequence[str], exclude: str) -> tuple[dict[str, str], dict[str, str]]:
    """Files named by ``inputs``, and those below folders, but not below ``exclude``, by real path.

    Returns:
        the path of each file, once, with its name: the path below the given folder, or the file's
        own name; and the problems of folders without files.
    """
    found: dict[str, tuple[str, str]] = {}
    problems: dict[str, str] = {}
    remedy = "Give images, videos, or a folder of them."
    excluded = os.path.join(os.path.realpath(exclude), "")
    for given in inputs:
        if not os.path.isdir(given):
            found.setdefault(os.path.realpath(given), (given, os.path.basename(given)))
            continue
        try:
            for path in list_images(given, IMAGE_EXTENSIONS + VIDEO_EXTENSIONS, remedy):
                if not (real := os.path.realpath(path)).startswith(excluded):
                    found.setdefault(real, (path, os.path.relpath(path, given)))
        except DatasetError as error:
            problems[given] = str(error)
    return dict(found.values()), problems


def output_names(media: Mapping[str, str]) -> dict[str, str]:
    """A path without suffix for each file, below the folder of overlays, no two the same."""
    names: dict[str, str] = {}
    taken: set[str] = set()  # as file systems that ignore case see them
    for path, given in media.items():
        stem = os.path.splitext(given)[0]
        choices = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
        names[path] = next(choice for choice in choices if choice.lower() not in taken)
        taken.add(names[path].lower())
    return names


def category_ids(cfg: CfgNode) -> list[int]:
    """Id of each class in DATASETS.TEST, if known, else 1, 2, ..."""
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    first = next(iter(cfg.DATASETS.TEST), "")
    known = MetadataCatalog.get(first).get("thing_dataset_id_to_contiguous_id") if first else None
    if known is None or sorted(known.values()) != list(range(count)):
        return list(range(1, count + 1))
    return sorted(known, key=known.get)
