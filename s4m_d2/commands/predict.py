"""Run a checkpoint on images, folders and videos; write overlays and COCO's results.

    python tools/demo.py --config-file configs/cityscapes_10pct.yaml \
        --weights output/student/model_final.pth --input photo.jpg drive.mp4 --output output/demo
    python tools/demo.py --config-file configs/toyscapes_10pct.yaml --model teacher \
        --weights output/quickstart/student/model_final.pth \
        --input datasets/toyscapes/leftImg8bit/val --output output/demo MODEL.DEVICE cpu

    python tools/demo.py --config-file output/own/config.yaml --tile 512 \
        --weights output/own/student/model_final.pth --input slide.png --output output/demo

Writes overlays/ (a PNG for each image, an MP4 for each video, under the names of the inputs),
predictions.json (COCO's list of results), and images.json (its images and categories). No data set
is needed. Unreadable files are listed at the end, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from s4m_d2.command_line import natural, print_problems, share
from s4m_d2.data.images import read_image
from s4m_d2.data.listing import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Video, list_images
from s4m_d2.engine.command.arguments import (
    add_model_options,
    command_parser,
    model_config,
    split_overrides,
)
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.figures.predictor import Predictor, class_names, load_model
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.evaluation.average_precision import RESULTS, write_coco_results
from s4m_d2.visualization import overlay, write_png
from s4m_d2.visualization.panels import write_video

OVERLAYS = "overlays"


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 all done, 1 an error, or files that cannot be read."""
    words, overrides = split_overrides(arguments)
    parser = command_parser(__doc__, overrides=True)
    add_model_options(parser, model="student", required=True)
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
    for key, value in (("SIZE", args.tile), ("OVERLAP", args.overlap)):
        overrides += [] if value is None else [f"INPUT.TILE.{key}", str(value)]
    cfg = model_config(args.config_file, args.weights, overrides)
    results = os.path.join(args.output, RESULTS)
    if os.path.exists(results) and not args.force:
        raise ConfigError(f"The output '{results}' exists. Add --force to replace it.")
    names = class_names(cfg, args.class_names)
    overlays = os.path.join(args.output, OVERLAYS)
    media, problems = find_media(args.input, exclude=overlays)
    model, _ = load_model(cfg, args.weights, args.model)
    predict, outputs = Predictor(cfg, model), output_names(media)
    counts: list[int] = []  # of instances, by image
    with (
        write_coco_results(args.output, names, category_ids(cfg)) as add,
        tqdm(total=sum(map(_frames, media)), unit="image", disable=None) as progress,
    ):

        def look(image: np.ndarray, **about: Any) -> np.ndarray:
            found = predict(image, args.score)
            add({**about, "height": image.shape[0], "width": image.shape[1]}, found)
            counts.append(len(found))
            progress.update()
            labels, scores = found.pred_classes.tolist(), found.scores.tolist()
            return overlay(image, found.pred_masks, labels, names, scores)

        for path in media:
            try:
                _draw(path, os.path.join(overlays, outputs[path]), look)
            except DatasetError as error:
                problems[path] = str(error)
    print(f"{len(counts):,} images, {sum(counts):,} instances: {args.output}")
    print_problems(problems, "cannot be used")
    return int(bool(problems))


def _is_video(path: str) -> bool:
    return path.lower().endswith(VIDEO_EXTENSIONS)


def _draw(path: str, output: str, look: Callable[..., np.ndarray]) -> None:
    """Predict on one file and write ``output``, a path without a suffix.

    DatasetError if it cannot be read, or a video not to its end; frames before are results.
    """
    if not _is_video(path):
        write_png(look(read_image(path, "RGB"), file_name=path), f"{output}.png")
        return
    video, problem = Video(path), None
    with write_video(f"{output}.mp4", video.fps) as write:
        try:
            for index, frame in enumerate(video):
                write(look(frame, file_name=path, frame=index))
        except DatasetError as error:  # what was drawn is kept
            problem = error
    if problem is not None:
        raise problem


def find_media(inputs: Sequence[str], exclude: str) -> tuple[dict[str, str], dict[str, str]]:
    """List the files named by ``inputs``, in that order; those of folders are sorted.

    Args:
        inputs: files, which need not exist, and folders, which are searched recursively for images
            and videos.
        exclude: a folder to skip in folders: that of results.

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
            paths = list_images(given, IMAGE_EXTENSIONS + VIDEO_EXTENSIONS, remedy)
        except DatasetError as error:
            problems[given] = str(error)
            continue
        for path in paths:
            real = os.path.realpath(path)
            if not real.startswith(excluded):
                found.setdefault(real, (path, os.path.relpath(path, given)))
    return dict(found.values()), problems


def output_names(media: Mapping[str, str]) -> dict[str, str]:
    """A path without suffix for each file, below the folder of overlays, no two the same."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path, given in media.items():
        stem, suffix = os.path.splitext(given)
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        choices = itertools.chain((stem, f"{stem}_{suffix[1:]}"), numbered)
        name = next(choice for choice in choices if choice.lower() not in taken)
        taken.add(name.lower())  # as file systems that ignore case see it
        names[path] = name
    return names


def category_ids(cfg: CfgNode) -> list[int]:
    """Id of each class in DATASETS.TEST, if known, else 1, 2, ..."""
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    first = next(iter(cfg.DATASETS.TEST), "")
    known = MetadataCatalog.get(first).get("thing_dataset_id_to_contiguous_id") if first else None
    if known is None or sorted(known.values()) != list(range(count)):
        return list(range(1, count + 1))
    return sorted(known, key=known.get)


def _frames(path: str) -> int:
    """Number of images in a file, by its header."""
    try:
        return Video(path).announced if _is_video(path) else 1
    except DatasetError:
        return 0
