"""``s4m-sepl``: enhance pseudo-labels with SAM's masks, measure and draw the result."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from s4m_d2.command_line import natural, positive, print_problems, share
from s4m_d2.data.listing import IMAGE_EXTENSIONS
from s4m_d2.engine.command.failures import exit_status
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.report import write_results
from s4m_d2.sam import SAM_BACKEND_REGISTRY
from s4m_d2.sam.automatic_masks import AutomaticMaskSettings
from s4m_d2.sepl.evaluate import AFTER, BEFORE, TRUTH, LabelFolders, compare
from s4m_d2.sepl.files import BACKGROUND_SCORE, PRESETS, class_names, files_by_name, image_list
from s4m_d2.sepl.folders import REPORT, ImageFiles, begin, enhance_files, outcomes, write_report
from s4m_d2.sepl.masks import SamMasks, find_masks
from s4m_d2.sepl.rule import O_P_THRESH, O_S_THRESH
from s4m_d2.sepl.visualize import Row, read_row, write_picture
from s4m_d2.visualization import evenly_spaced

MASK_CACHE = "masks"  # the folder below the enhanced labels
BEST = WORST = 5
COUNT = 8
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
OPTIONS = ("background_score", "o_s_thresh", "o_p_thresh", "keep_uncovered")
AUTOMATIC = [field.name for field in fields(AutomaticMaskSettings)]
SAM_OPTIONS = ["sam_type", "sam_checkpoint", "device", "mask_cache", *AUTOMATIC]


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 all done, 1 an error, or images that failed, 2 misuse."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "enhance")
    parser = argparse.ArgumentParser(
        prog="s4m-sepl",
        description="Enhance CAM pseudo-labels with SAM's masks (SEPL, arXiv 2305.05803).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (run, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        add_arguments(command)
        _add_label_arguments(command)
    args = parser.parse_args(words)
    return args.run(args)


def enhance(args: argparse.Namespace) -> int:
    """Redraw a folder of label maps with SAM's masks (what is done without a name). What is there
    is skipped: the same command continues. OUTPUT/sepl.json has settings and problems."""
    source, num_classes = _mask_source(args), len(_class_names(args))
    _check_output(args)
    settings = _settings(args, source, num_classes)
    labels = files_by_name(args.pseudo_labels, suffix=args.suffix)
    images = files_by_name(args.images, IMAGE_EXTENSIONS) if args.images else {}
    wanted = image_list(args.list) if args.list else list(labels)
    finished = begin(args.output, settings, {*labels, *wanted}, args.overwrite)
    waiting = [name for name in wanted if name not in finished]
    problems = {name: "no pseudo-label of this name" for name in waiting if name not in labels}
    if args.images:
        problems |= {name: "no image of this name" for name in waiting if name not in images}
    jobs = [ImageFiles(n, labels[n], images.get(n)) for n in waiting if n not in problems]
    given = {name: getattr(args, name) for name in ("output", *OPTIONS)}
    work = partial(enhance_files, source=source, num_classes=num_classes, **given)
    on_gpu = isinstance(source, SamMasks) and source.device == "cuda"
    with closing(outcomes(work, jobs, 1 if on_gpu else args.workers)) as stream:
        results = list(tqdm(stream, "sepl", len(jobs), unit="image"))
    problems |= {result.name: result.problem for result in results if result.problem}
    write_report(args.output, settings, problems)
    print_problems(problems, "failed")
    written = [result for result in results if not result.problem]
    if written and not any(result.has_class for result in written):
        print(
            "warning: no label map has a class: all pixels are background (0) or void (255). "
            "Labels need class indices; masks of 0 and 255 have none.",
            file=sys.stderr,
        )
    print(
        f"{len(written)} images enhanced, {len(finished & {*wanted})} were before, "
        f"{len(problems)} failed: see {args.output / REPORT}",
        file=sys.stderr,
    )
    return 1 if problems else 0


def evaluate(args: argparse.Namespace) -> int:
    """IoU of each class, mIoU and pixel accuracy over a whole data set, as VOC's benchmark counts
    them, before and after."""
    names = _class_names(args)
    listed = image_list(args.list) if args.list else None
    report = compare(_label_folders(args, len(names)), names, listed)
    if args.json is not None:
        write_results(report, args.json)
    count = report["num_images"]
    if count:
        print(score_table(report) + "\n")
    line = f"{count} image{'s' * (count != 1)}"
    if "improved" in report:
        improved, worsened = report["improved"], report["worsened"]
        same = count - improved - worsened
        line += f": {improved} improved, {worsened} worsened, {same} as before"
    print(line)
    print_problems(report["problems"], "could not be compared")
    return 1 if report["problems"] else 0


def score_table(report: Mapping[str, Any]) -> str:
    """A Markdown table in percent: a row per class, then mIoU and pixel accuracy."""

    def percent(value: float, column: str) -> str:
        sign = "+" if column == "gain" else ""
        return "–" if math.isnan(value) else f"{100 * value:{sign}.2f}"

    rows = report["iou"] | {"mIoU": report["miou"], "pixel accuracy": report["pixel_accuracy"]}
    columns = list(report["miou"])
    cells = [
        (name.replace("|", r"\|"), *(percent(values[key], key) for key in columns))
        for name, values in rows.items()
    ]
    align = ("left", *("right" for _ in columns))
    options: dict[str, Any] = {"tablefmt": "pipe", "disable_numparse": True}
    return tabulate(cells, ["", *columns], colalign=align, **options)


def visualize(args: argparse.Namespace) -> int:
    """Draw images, their labels before and after, SAM's masks and the ground truth side by side."""
    names = _class_names(args)
    folders = _label_folders(args, len(names))
    images = files_by_name(args.images, IMAGE_EXTENSIONS)
    chosen, problems = _chosen(args, folders, names, images)
    rows: list[Row] = []
    for name in dict.fromkeys(chosen):
        try:
            masks = find_masks(args.masks or args.enhanced / MASK_CACHE, name)
            if masks is None and args.masks is not None:
                raise DatasetError(f"no masks in '{args.masks}'")
            rows.append(read_row(name, folders, images.get(name), masks))
        except DatasetError as error:
            problems[name] = str(error)
    print_problems(problems, "with problems")
    if not rows:
        raise DatasetError("no image could be drawn: none of those chosen is complete, or scored")
    write_picture(args.output, rows, names)
    print(f"{len(rows)} image{'s' * (len(rows) != 1)} in {args.output}")
    return 1 if problems else 0


def _class_names(args: argparse.Namespace) -> tuple[str, ...]:
    return class_names(args.preset or "voc", args.num_classes, args.class_names)


def _label_folders(args: argparse.Namespace, num_classes: int) -> LabelFolders:
    folders = {TRUTH: args.ground_truth, BEFORE: args.pseudo_labels, AFTER: args.enhanced}
    return LabelFolders(folders, num_classes, args.suffix, args.background_score)


def _mask_source(args: argparse.Namespace) -> Path | SamMasks:
    given = {name: value for name in SAM_OPTIONS if (value := getattr(args, name)) is not None}
    if args.masks is not None and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"--masks takes the masks of '{args.masks}' as they are, but {options} concern masks "
            "that SAM makes. Leave them out, or give --sam instead of --masks."
        )
    if args.masks is not None:
        return args.masks
    if args.images is None:
        raise ConfigError("--sam needs --images: SAM makes the masks of images")
    return SamMasks(
        backend=args.sam,
        model_type=given.pop("sam_type", ""),
        checkpoint=given.pop("sam_checkpoint", ""),
        device=given.pop("device", DEVICES[0]),
        cache=given.pop("mask_cache", args.output / MASK_CACHE),
        automatic=AutomaticMaskSettings(**given),
    )


def _settings(
    args: argparse.Namespace, source: Path | SamMasks, num_classes: int
) -> dict[str, Any]:
    """Settings that determine the label maps up to rounding, for JSON."""
    settings = {name: getattr(args, name) for name in ("pseudo_labels", *OPTIONS)}
    settings["num_classes"] = num_classes
    if isinstance(source, SamMasks):
        checkpoint = source.checkpoint and Path(source.checkpoint)
        settings |= {"sam": source.backend, "sam_type": source.model_type, "images": args.images}
        settings |= {"sam_checkpoint": checkpoint, **asdict(source.automatic)}
        del settings["points_per_batch"]
    else:
        settings["masks"] = source
    return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in settings.items()}


def _check_output(args: argparse.Namespace) -> None:
    """ConfigError if the output is in, or is, an input folder."""
    read = {"--pseudo-labels": args.pseudo_labels, "--images": args.images, "--masks": args.masks}
    for written in filter(None, (args.output, args.mask_cache)):
        place = written.resolve()
        for option, folder in read.items():
            if folder is not None and folder.resolve() in (place, *place.parents):
                raise ConfigError(
                    f"'{written}' is to be written, but is or lies in the folder of {option}, "
                    "which must stay as it is. Choose another one."
                )


def _chosen(
    args: argparse.Namespace,
    folders: LabelFolders,
    names: Sequence[str],
    images: Mapping[str, Path],
) -> tuple[list[str], dict[str, str]]:
    """Names of the images to draw, and problems of those that could not be scored."""
    is_ranked = args.best is not None or args.worst is not None
    if is_ranked + (args.names is not None) + (args.count is not None) > 1:
        raise ConfigError(
            "--names, --count and --best, --worst exclude each other; say in one way which images "
            "to draw"
        )
    if is_ranked and args.ground_truth is None:
        raise ConfigError(
            "--best and --worst need to know what the images gained: give --ground-truth DIR"
        )
    if args.names is not None:
        return args.names, {}
    complete = sorted(set(images).intersection(*folders.files.values()))
    if args.count is not None or args.ground_truth is None:
        return evenly_spaced(complete, args.count or COUNT), {}
    report = compare(folders, names, complete)
    scored = [image for image in report["images"] if not math.isnan(image["gain"])]
    ranked = [i["name"] for i in sorted(scored, key=lambda i: (-i["gain"], i["name"]))]
    best, worst = (args.best or 0, args.worst or 0) if is_ranked else (BEST, WORST)
    return ranked[:best] + ranked[max(best, len(ranked) - worst) :], report["problems"]


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suffix", default="", metavar="S", help="of the pseudo-labels' names: with _pseudo "
        "NAME_pseudo.png is that of the image NAME")  # fmt: skip
    add("--background-score", type=share, default=BACKGROUND_SCORE, metavar="X",
        help="of pseudo-labels that are CAM scores: a pixel has a class where its score exceeds "
        "this; default: %(default)s")  # fmt: skip
    add = parser.add_argument_group("classes").add_mutually_exclusive_group().add_argument
    add("--preset", choices=sorted(PRESETS),
        help="voc: VOC 2012, 21 classes (default); coco: COCO 2014, 81")  # fmt: skip
    add("--num-classes", type=positive, metavar="N", help="of other data, with background")
    add("--class-names", type=Path, metavar="FILE", help="one name per line, 'background' first")


def _add_enhance_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pseudo-labels", type=Path, required=True, metavar="DIR",
        help="class indices (PNG, .npy) or CAM scores (.npy)")  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="for --sam; with --masks sizes are compared")
    add("--output", type=Path, required=True, metavar="DIR")
    add("--list", type=Path, metavar="FILE", help="names of images, one per line")
    add("--o-s-thresh", type=share, default=O_S_THRESH, metavar="X",
        help="selects a mask if more of it lies on its class; default: %(default)s")  # fmt: skip
    add("--o-p-thresh", type=share, default=O_P_THRESH, metavar="X",
        help="or if it holds more of its class; default: %(default)s")  # fmt: skip
    add("--keep-uncovered", action="store_true",
        help="pixels that no mask covers keep their label")  # fmt: skip
    add("--workers", type=positive, default=1, metavar="N",
        help="processes; default: %(default)s. One where SAM works on a GPU")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing label maps")
    group = parser.add_argument_group("masks", "either those of a folder, or SAM's own")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--masks", type=Path, metavar="DIR",
        help="NAME/ with a binary PNG per mask, or NAME.json(.gz) with COCO RLEs")  # fmt: skip
    source.add_argument("--sam", choices=sorted(key for key, _ in SAM_BACKEND_REGISTRY))
    add = group.add_argument
    add("--sam-type", metavar="T", help="vit_b, vit_l, vit_h, vit_t; hiera_t ... hiera_l")
    add("--sam-checkpoint", metavar="FILE", help="tiny, tiny_toyscapes: in the package")
    add("--device", choices=DEVICES, help="default: cuda if any")
    add("--mask-cache", type=Path, metavar="DIR",
        help=f"folder of SAM's masks; default: {MASK_CACHE} in the output folder")  # fmt: skip
    automatic = parser.add_argument_group("SAM's automatic masks", "SAM's own names and defaults")
    for field in fields(AutomaticMaskSettings):
        automatic.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default),
            metavar="X", help=f"default: {field.default:.4g}")  # fmt: skip


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--enhanced", type=Path, required=True, metavar="DIR", help="label maps under test")
    add("--pseudo-labels", type=Path, metavar="DIR", help="those before, to compare with")
    add("--ground-truth", type=Path, required=True, metavar="DIR", help="true label maps")
    add("--list", type=Path, metavar="FILE", help="names of the images to compare, such as VOC's "
        "train.txt (default: all that have a label; the ground truth may be of more)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write a report, with the mIoU of each image")


def _add_visualize_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="the images")
    add("--pseudo-labels", type=Path, required=True, metavar="DIR", help="label maps before")
    add("--enhanced", type=Path, required=True, metavar="DIR", help="those after it")
    add("--masks", type=Path, metavar="DIR",
        help=f"SAM's masks (default: the folder '{MASK_CACHE}' of --enhanced, if any)")  # fmt: skip
    add("--ground-truth", type=Path, metavar="DIR", help="true label maps")
    add("--output", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    add = parser.add_argument_group("which images").add_argument
    add("--best", type=natural, metavar="N", help="images whose own mIoU gained most (default "
        f"with a ground truth: {BEST})")  # fmt: skip
    add("--worst", type=natural, metavar="N", help=f"and least (default: {WORST})")
    add("--names", nargs="+", metavar="NAME", help="these images")
    add("--count", type=positive, metavar="N",
        help=f"images evenly spaced by name (default without a ground truth: {COUNT})")  # fmt: skip


COMMANDS = {
    "enhance": (enhance, _add_enhance_arguments),
    "evaluate": (evaluate, _add_evaluate_arguments),
    "visualize": (visualize, _add_visualize_arguments),
}
