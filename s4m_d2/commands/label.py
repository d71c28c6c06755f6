"""Label a folder of images for an annotation tool, with a model and SAM.

    s4m-label --weights output/own/student/model_final.pth --images DIR --output OUT
    s4m-label --weights W --images DIR --output OUT --format labelme --score 0.8
    torchrun --nproc-per-node 4 -m s4m_d2.commands.label --weights W --images DIR --output OUT
    s4m-label --merge --output OUT

Images are labeled as in stage 2: in tiles if the training used tiles, above a class probability,
with masks refined by SAM unless the gate of the run switched that off. Of two labels with an IoU
above 0.7 the better one is kept (S4M.PSEUDO_LABEL.DUPLICATE_IOU).
--format: coco (annotations.json), labelme (a json for each image) or label-studio (tasks.json and
interface.xml). Finished images are stored in OUT/labels-*.jsonl: the same command continues a
killed one. With several processes each labels its share; --merge then writes the format. Unreadable
images are listed at the end, and the exit status is then 1.
"""

import argparse
import glob
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import pycocotools.mask as mask_util
import torch
from tqdm import tqdm

from s4m_d2.data.images import IMAGE_EXTENSIONS, list_images, read_image
from s4m_d2.engine.command.arguments import (
    model_config,
    model_parser,
    natural,
    print_problems,
    share,
    split_overrides,
)
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.figures.predictor import Labeler, Predictor, class_names, load_model
from s4m_d2.engine.labeling.gate import labeling_of_run
from s4m_d2.engine.rng import derive_seed
from s4m_d2.engine.stages import last_weights
from s4m_d2.errors import ConfigError, DatasetError, first_names
from s4m_d2.files import digest, remove_lines
from s4m_d2.formats import FORMATS
from s4m_d2.report import read_results, write_results
from s4m_d2.structures import as_rles, plain_rle

SETTINGS = ".label.json"  # of OUT: with what it was labeled; LabelMe's files have no such names


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 0 all done, 1 an error, or images that cannot be read."""
    words, overrides = split_overrides(arguments)
    parser = model_parser(__doc__, model="teacher", required=False)
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="new, empty, or of the same command")
    add("--merge", action="store_true", help="write the format from what all processes labeled")
    add("--images", metavar="DIR", help="searched recursively")
    add("--format", choices=sorted(FORMATS), default="coco", help="default: coco")
    add("--score", type=share, help="least class probability (default: the config's)")
    add("--min-area", type=natural, default=0, metavar="PX", help="of a mask (default: 0)")
    add("--max-instances", type=natural, default=0, help="the best of an image; 0: all (default)")
    args = parser.parse_args(words)
    if args.merge:
        return merge(args.output)
    if not (args.weights and args.images):
        parser.error("--weights and --images are needed, or --merge")
    return label(args, overrides)


def label(args: argparse.Namespace, overrides: list[str]) -> int:
    """Label what is not labeled yet; alone, also write the format."""
    args.weights = last_weights(args.weights)
    score = [] if args.score is None else ["S4M.PSEUDO_LABEL.SCORE_THRESH", str(args.score)]
    once = ["S4M.PSEUDO_LABEL.DUPLICATE_IOU", "0.7"]  # one label per instance, to correct
    cfg = model_config(args.config_file, args.weights, [*once, *overrides, *score])
    names = class_names(cfg, args.class_names)
    remedy = "--images names a folder of images."
    found = list_images(args.images, IMAGE_EXTENSIONS, remedy)
    paths = [os.path.relpath(path, args.images) for path in found]
    _claim(args, {"config": cfg.dump(), "names": names})
    rank, processes = (int(os.environ.get(key, x)) for key, x in (("RANK", 0), ("WORLD_SIZE", 1)))
    done = {row["file_name"] for row in labeled_rows(args.output)}
    left = [path for path in paths[rank::processes] if path not in done]
    problems: dict[str, str] = {}
    if left:
        if cfg.MODEL.DEVICE == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        model, _ = load_model(cfg, args.weights, args.model)
        predict = Predictor(cfg, Labeler(labeling_of_run(cfg, args.weights, model)))
        rows = os.path.join(args.output, f"labels-{rank}.jsonl")
        remove_lines(rows, sys.maxsize)  # the last one, if a kill has torn it
        with open(rows, "ab") as file:
            for path in tqdm(left, unit="image", disable=None):
                torch.manual_seed(derive_seed(cfg.SEED, "label", path))  # of SAM's clicks
                try:
                    row = _label(predict, path, args)
                except DatasetError as error:
                    problems[path] = str(error)
                    continue
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
    status = print_problems(problems, "cannot be used")
    if processes == 1:
        return max(merge(args.output), status)
    print(f"Process {rank} is done. When all are: s4m-label --merge --output {args.output}")
    return status


def merge(folder: str) -> int:
    """Write the format of a folder from what is labeled in it; the exit status."""
    settings = read_settings(folder)
    counts = [len(row["instances"]) for row in labeled_rows(folder)]
    if not counts:
        raise ConfigError(f"--output '{folder}': no image was labeled: nothing to write.")
    write = FORMATS[settings["format"]]
    path = write(lambda: labeled_rows(folder), settings["names"], folder, settings["images"])
    print(f"{len(counts):,} images, {sum(counts):,} instances: {path}")
    return 0


def read_settings(folder: str) -> dict[str, Any]:
    """With what a folder was labeled; ConfigError if it is no folder of this command."""
    try:
        return read_results(os.path.join(folder, SETTINGS))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{folder}' is no output of s4m-label: {error}. Label first.") from error


def _claim(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Note with what OUT is labeled, or refuse one that was labeled otherwise, or holds others."""
    wanted = {key: getattr(args, key) for key in ("model", "format", "min_area", "max_instances")}
    wanted |= {key: os.path.abspath(getattr(args, key)) for key in ("weights", "images")} | content
    wanted["content of weights"] = digest(args.weights)
    path = os.path.join(args.output, SETTINGS)
    # Looked at once: other processes begin at the same time.
    present = os.listdir(args.output) if os.path.isdir(args.output) else []
    if SETTINGS not in present and any(not name.startswith(".") for name in present):
        raise ConfigError(f"--output '{args.output}' is not empty. Choose another folder.")
    if SETTINGS in present and any(labeled_rows(args.output)):
        found = read_results(path)
        if changed := [key for key in wanted if found.get(key) != wanted[key]]:
            lines = str(found.get("config")).splitlines()
            of_config = [line.strip() for line in lines if line not in content["config"]]
            was = {**found, "config": first_names(of_config)}
            others = " and ".join(f"{key} ({was.get(key)})" for key in changed)
            remedy = "Choose another folder, or repeat the command as it was."
            raise ConfigError(f"'{args.output}' was labeled with another {others}. {remedy}")
    write_results(wanted, path)


def _label(predict: Predictor, path: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of an image; DatasetError if it cannot be read."""
    image = read_image(os.path.join(args.images, path), "RGB")
    found = predict(image)
    rles = as_rles(found.pred_masks)
    fields = (found.pred_classes, found.scores, found.sam_ious)
    instances = [
        {"class": index, "score": round(score, 4), "segmentation": plain_rle(rle)}
        | ({} if math.isnan(iou) else {"sam_iou": round(iou, 4)})
        for index, score, iou, rle in zip(*(f.tolist() for f in fields), rles, strict=True)
        if mask_util.area(rle) >= max(args.min_area, 1)
    ]
    size = {"height": image.shape[0], "width": image.shape[1]}
    return {"file_name": path, **size, "instances": instances[: args.max_instances or None]}


def labeled_rows(folder: str) -> Iterator[dict[str, Any]]:
    """All labeled images of a folder, in the order of the processes' files."""
    for name in sorted(glob.glob(os.path.join(glob.escape(folder), "labels-*.jsonl"))):
        with open(name, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # else torn by a kill
                    yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
