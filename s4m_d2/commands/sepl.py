"""``s4m-sepl``: enhance pseudo-labels with SAM's masks, measure and draw the result."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from s4m_d2.engine.command.arguments import natural, positive, print_problems, share
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.report import write_results
from s4m_d2.sam import SAM_BACKEND_REGISTRY
from s4m_d2.sam.automatic_masks import AutomaticMaskSettings
from s4m_d2.sepl.files import (
    AFTER,
    BACKGROUND_SCORE,
    BEFORE,
    IMAGE,
    PRESETS,
    TRUTH,
    ImageFiles,
    class_names,
    image_list,
)
from s4m_d2.sepl.folders import REPORT, Enhancement, SamMasks, begin, write_report
from s4m_d2.sepl.results import Row, compare, read_row, write_picture
from s4m_d2.sepl.rule import O_P_THRESH, O_S_THRESH
from s4m_d2.visualization import evenly_spaced

MASK_CACHE = "masks"  # the folder below the enhanced labels
BEST = WORST = 5
COUNT = 8
# Of options.
FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
SHARE: dict[str, Any] = {"type": share, "metavar": "X"}
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
OPTIONS = ("o_s_thresh", "o_p_thresh", "keep_uncovered")  # of the rule
AUTOMATIC = {field.name: field.default for field in fields(AutomaticMaskSettings)}
# Options of --sam and their defaults.
SAM_OPTIONS: dict[str, Any] = {
    "sam_type": "", "sam_checkpoint": "", "device": DEVICES[0], "mask_cache": None, **AUTOMATIC
}  # fmt: skip


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 all done, 1 an error, or images that failed, 2 misuse."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "enhance")
    about = "Enhance CAM pseudo-labels with SAM's masks (SEPL, arXiv 2305.05803)."
    parser = argparse.ArgumentParser(prog="s4m-sepl", description=about)
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
    source, files = _mask_source(args), _files(args)
    _check_output(args)
    settings = _settings(args, len(files.class_names))
    labels = files.by_kind[BEFORE]
    wanted = image_list(args.list) if args.list else list(labels)
    if args.overwrite and isinstance(source, SamMasks):
        replace(source).generator.fingerprint()  # an error comes before anything is removed
    finished = begin(args.output, settings, labels, wanted, args.overwrite)
    waiting = [name for name in wanted if name not in finished]
    options = {name: getattr(args, name) for name in OPTIONS}
    workers = 1 if isinstance(source, SamMasks) and source.device == "cuda" else args.workers
    problems, have_class = Enhancement(waiting, files, source, args.output, options).run(workers)
    write_report(args.output, settings, problems)
    if have_class and not any(have_class):
        warning = "all pixels are background (0) or void (255). Labels need class indices."
        print(f"warning: no label map has a class: {warning}", file=sys.stderr)
    counts = f"{len(have_class)} images enhanced, {len(finished & {*wanted})} were before"
    print(f"{counts}, {len(problems)} failed: see {args.output / REPORT}", file=sys.stderr)
    return print_problems(problems, "failed")


def evaluate(args: argparse.Namespace) -> int:
    """IoU of each class, mIoU and pixel accuracy over a whole data set, as VOC's benchmark counts
    them, before and after."""
    report = compare(_files(args), image_list(args.list) if args.list else None)
    if args.json is not None:
        write_results(report, args.json)
    count = report["num_images"]
    if count:
        print(score_table(report) + "\n")
    line = f"{count} image{'s' * (count != 1)}"
    if "improved" in report:
        better, worse = report["improved"], report["worsened"]
        line += f": {better} improved, {worse} worsened, {count - better - worse} as before"
    print(line)
    return print_problems(report["problems"], "could not be compared")


def score_table(report: Mapping[str, Any]) -> str:
    """A Markdown table in percent: a row per class, then mIoU and pixel accuracy."""

    def percent(value: float, column: str) -> str:
        sign = "+" if column == "gain" else ""
        return "–" if math.isnan(value) else f"{100 * value:{sign}.2f}"

    rows = report["iou"] | {"mIoU": report["miou"], "pixel accuracy": report["pixel_accuracy"]}
    columns = list(report["miou"])
    texts = ([percent(of[key], key) for key in columns] for of in rows.values())
    cells = [(name.replace("|", r"\|"), *row) for name, row in zip(rows, texts, strict=True)]
    align = ("left", *("right" for _ in columns))
    return tabulate(cells, ["", *columns], "pipe", colalign=align, disable_numparse=True)


def visualize(args: argparse.Namespace) -> int:
    """Draw images, their labels before and after, SAM's masks and the ground truth side by side."""
    files = _files(args)
    cache = args.enhanced / MASK_CACHE
    masks = args.masks or (cache if cache.is_dir() else None)
    chosen, problems = _chosen(args, files)
    rows: list[Row] = []
    for name in dict.fromkeys(chosen):
        try:
            rows.append(read_row(name, files, masks))
        except DatasetError as error:
            problems[name] = str(error)
    print_problems(problems, "with problems")
    if not rows:
        raise DatasetError("no image could be drawn: none of those chosen is complete, or scored")
    write_picture(args.output, rows, files.class_names)
    print(f"{len(rows)} image{'s' * (len(rows) != 1)} in {args.output}")
    return 1 if problems else 0


def _chosen(args: argparse.Namespace, files: ImageFiles) -> tuple[list[str], dict[str, str]]:
    """Names of the images to draw, and problems of those that could not be scored."""
    best, worst, count = args.best, args.worst, args.count
    if not (args.names or best or worst or count):
        best, worst, count = (BEST, WORST, 0) if args.ground_truth else (0, 0, COUNT)
    complete = sorted(set.intersection(*map(set, files.by_kind.values())))
    chosen = [*args.names, *evenly_spaced(complete, count)]
    if not (best or worst):
        return chosen, {}
    if args.ground_truth is None:
        raise ConfigError("--best and --worst need --ground-truth DIR: what the images gained.")
    report = compare(files, complete)
    scored = [image for image in report["images"] if not math.isnan(image["gain"])]
    ranked = [i["name"] for i in sorted(scored, key=lambda i: (-i["gain"], i["name"]))]
    chosen += ranked[:best] + ranked[max(best, len(ranked) - worst) :]
    return chosen, report["problems"]


def _files(args: argparse.Namespace) -> ImageFiles:
    options = {TRUTH: "ground_truth", BEFORE: "pseudo_labels", AFTER: "enhanced", IMAGE: "images"}
    folders = {kind: getattr(args, option, None) for kind, option in options.items()}
    names = class_names(args.preset or "voc", args.num_classes, args.class_names)
    return ImageFiles(folders, names, args.suffix, args.background_score)


def _mask_source(args: argparse.Namespace) -> Path | SamMasks:
    if args.masks is not None:
        given = [name for name, value in SAM_OPTIONS.items() if getattr(args, name) != value]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(
                f"--masks uses '{args.masks}' as it is, but {options} concern masks that SAM "
                "makes. Leave them out, or give --sam instead of --masks."
            )
        if not args.masks.is_dir():
            expected = "expected NAME/ or NAME.json for each image"
            raise ConfigError(f"--masks '{args.masks}' is no folder; {expected}.")
        return args.masks
    if args.images is None:
        raise ConfigError("--sam needs --images: SAM makes the masks of images")
    automatic = AutomaticMaskSettings(**{name: getattr(args, name) for name in AUTOMATIC})
    cache = args.mask_cache or args.output / MASK_CACHE
    model = args.sam, args.sam_type, args.sam_checkpoint
    return SamMasks(model, args.device, cache, automatic)


def _settings(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """Settings that determine the label maps up to rounding, for JSON."""
    of_sam = ("sam", "sam_type", "images", "sam_checkpoint", *AUTOMATIC)
    names = ["pseudo_labels", "suffix", "background_score", *OPTIONS, "num_classes"]
    names += [n for n in of_sam if n != "points_per_batch"] if args.sam else ["masks"]
    checkpoint = Path(args.sam_checkpoint)
    checkpoint = checkpoint if checkpoint.exists() else args.sam_checkpoint  # a name in a hub
    values = {**vars(args), "num_classes": num_classes, "sam_checkpoint": checkpoint}
    found = ((name, values[name]) for name in names)
    return {name: str(v.resolve()) if isinstance(v, Path) else v for name, v in found}


def _check_output(args: argparse.Namespace) -> None:
    """ConfigError if the output is in, or is, an input folder."""
    read = {"--pseudo-labels": args.pseudo_labels, "--images": args.images, "--masks": args.masks}
    for written in filter(None, (args.output, args.mask_cache)):
        for option, folder in read.items():
            if folder and written.resolve().is_relative_to(folder.resolve()):
                place = f"the folder of {option}, which must stay as it is"
                raise ConfigError(f"'{written}' would be written into {place}. Choose another.")


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--suffix", default="", metavar="S", help="end of pseudo-labels' names, such as _pseudo")
    help = "of CAM scores: a class needs more; default: %(default)s"
    add("--background-score", default=BACKGROUND_SCORE, help=help, **SHARE)
    add = parser.add_argument_group("classes").add_mutually_exclusive_group().add_argument
    help = "voc: VOC 2012, 21 classes (default); coco: COCO 2014, 81"
    add("--preset", choices=sorted(PRESETS), help=help)
    add("--num-classes", type=positive, metavar="N", help="of other data, with background")
    add("--class-names", help="one name per line, 'background' first", **FILE)


def _add_enhance_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help = "class indices (PNG, .npy) or CAM scores (.npy)"
    add("--pseudo-labels", required=True, help=help, **FOLDER)
    add("--images", help="for --sam; with --masks sizes are compared", **FOLDER)
    add("--output", required=True, help="of the enhanced label maps", **FOLDER)
    add("--list", help="names of images, one per line; default: all", **FILE)
    help = "selects a mask if more of it lies on its class; default: %(default)s"
    add("--o-s-thresh", default=O_S_THRESH, help=help, **SHARE)
    help = "or if it holds more of its class; default: %(default)s"
    add("--o-p-thresh", default=O_P_THRESH, help=help, **SHARE)
    add("--keep-uncovered", action="store_true", help="pixels without a mask keep their label")
    help = "processes; default: %(default)s. One where SAM works on a GPU"
    add("--workers", type=positive, default=1, metavar="N", help=help)
    add("--overwrite", action="store_true", help="replace existing label maps")
    group = parser.add_argument_group("masks", "either those of a folder, or SAM's own")
    source = group.add_mutually_exclusive_group(required=True)
    help = "NAME/ with a binary PNG per mask, or NAME.json(.gz) with COCO RLEs"
    source.add_argument("--masks", help=help, **FOLDER)
    source.add_argument("--sam", choices=sorted(key for key, _ in SAM_BACKEND_REGISTRY))
    add = group.add_argument
    add("--sam-type", default="", metavar="T", help="vit_b, vit_l, vit_h, vit_t; hiera_t ... _l")
    add("--sam-checkpoint", default="", metavar="FILE", help="tiny, tiny_toyscapes: in the package")
    add("--device", choices=DEVICES, default=DEVICES[0], help="default: cuda if any")
    add("--mask-cache", help=f"of SAM's masks; default: OUTPUT/{MASK_CACHE}", **FOLDER)
    automatic = parser.add_argument_group("SAM's automatic masks", "SAM's own names and defaults")
    for name, value in AUTOMATIC.items():
        option, help = f"--{name.replace('_', '-')}", f"default: {value:.4g}"
        automatic.add_argument(option, type=type(value), default=value, metavar="X", help=help)


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--enhanced", required=True, help="label maps under test", **FOLDER)
    add("--pseudo-labels", help="those before, to compare with", **FOLDER)
    add("--ground-truth", required=True, help="true label maps, of these images or more", **FOLDER)
    add("--list", help="names of the images to compare; default: all that have a label", **FILE)
    add("--json", help="write a report, with the mIoU of each image", **FILE)


def _add_visualize_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", required=True, help="the images", **FOLDER)
    add("--pseudo-labels", required=True, help="label maps before", **FOLDER)
    add("--enhanced", required=True, help="those after it", **FOLDER)
    add("--masks", help=f"SAM's masks; default: {MASK_CACHE} in --enhanced, if any", **FOLDER)
    add("--ground-truth", help="true label maps", **FOLDER)
    add("--output", required=True, help="the picture, a PNG", **FILE)
    add = parser.add_argument_group("which images", "of several options all").add_argument
    help = f"whose own mIoU gained most; default with a ground truth: {BEST}"
    add("--best", type=natural, default=0, metavar="N", help=help)
    add("--worst", type=natural, default=0, metavar="N", help=f"and least; likewise {WORST}")
    add("--names", nargs="+", default=[], metavar="NAME", help="these")
    help = f"evenly spaced by name; default without a ground truth: {COUNT}"
    add("--count", type=natural, default=0, metavar="N", help=help)


COMMANDS = {
    "enhance": (enhance, _add_enhance_arguments),
    "evaluate": (evaluate, _add_evaluate_arguments),
    "visualize": (visualize, _add_visualize_arguments),
}
