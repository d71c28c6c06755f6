"""``s4m-sepl visualize``: a picture of what the enhancement changed, a row an image."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from s4m_d2.command_line import default_workers, natural, positive, print_problems
from s4m_d2.errors import DatasetError, InputError, S4MError
from s4m_d2.sepl.classes import add_class_arguments, classes_from
from s4m_d2.sepl.comparison import AFTER, BEFORE, TRUTH, ImageScore, LabelFolders, compare
from s4m_d2.sepl.drawing import legend_entries
from s4m_d2.sepl.evaluate_command import read_report
from s4m_d2.sepl.labels import add_label_arguments
from s4m_d2.sepl.listing import image_files
from s4m_d2.sepl.picture_rows import IMAGE, MASKS, Inputs, Row
from s4m_d2.visualization import evenly_spaced, panel_grid

# A column for each kind of picture, in this order.
COLUMNS = {
    IMAGE: "image",
    BEFORE: "CAM pseudo-label",
    MASKS: "SAM's masks",
    AFTER: "SEPL",
    TRUTH: "ground truth",
}
MASK_CACHE = "masks"  # the folder below the enhanced labels
BEST = WORST = 5
COUNT = 8
SUFFIX = ".png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`run` reads."""
    parser.description = (
        "Draw images, their labels before and after, SAM's masks and the ground truth side by side."
    )
    for option, required, text in (
        ("--images", True, "the images"),
        ("--pseudo-labels", True, "label maps before the enhancement"),
        ("--enhanced", True, "those after it"),
        ("--masks", False, "SAM's masks (default: the folder 'masks' of --enhanced, if any)"),
        ("--ground-truth", False, "true label maps"),
    ):
        parser.add_argument(option, type=Path, required=required, metavar="DIR", help=text)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE.png", help="the picture to write"
    )
    add_label_arguments(parser)
    add_class_arguments(parser)
    group = parser.add_argument_group("which images")
    for option, count, text in (("--best", BEST, "most"), ("--worst", WORST, "least")):
        group.add_argument(
            option,
            type=natural,
            metavar="N",
            help=f"images whose own mIoU gained {text} (default with a ground truth: {count})",
        )
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="take the gains from what 's4m-sepl evaluate --json FILE' wrote, instead of scoring "
        "all images again",
    )
    group.add_argument("--names", nargs="+", metavar="NAME", help="these images")
    group.add_argument(
        "--count",
        type=positive,
        metavar="N",
        help=f"images evenly spaced by name (default without a ground truth: {COUNT})",
    )


def run(args: argparse.Namespace) -> int:
    """Draw and write the picture.

    Returns:
        The exit status: 0, or 1 if something is missing or wrong with some of the images.

    Raises:
        S4MError: there is nothing to draw, or options contradict each other.
    """
    _check_options(args)
    classes = classes_from(args)
    paths = {BEFORE: args.pseudo_labels, AFTER: args.enhanced, TRUTH: args.ground_truth}
    inputs = Inputs(
        LabelFolders(paths, classes.num_classes, args.suffix, args.background_score),
        image_files(args.images),
        args.masks or args.enhanced / MASK_CACHE,
        needs_masks=args.masks is not None,
    )
    names, scores, problems = _chosen(args, inputs)
    rows = []
    for name in dict.fromkeys(names):
        try:
            row = inputs.row(name, scores.get(name))
        except S4MError as error:
            problems[name] = str(error)
            continue
        rows.append(row)
        if row.problem is not None:
            problems[name] = row.problem
    print_problems(problems, "with problems")
    if not rows:
        raise DatasetError("no image could be drawn: none of those chosen is complete, or scored")
    write_picture(args.output, rows, classes.names)
    print(f"{len(rows)} image{'s' * (len(rows) != 1)} in {args.output}")
    return 1 if problems else 0


def write_picture(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write the grid of all rows; kinds of pictures that no row has take no column."""
    kinds = [kind for kind in COLUMNS if any(kind in row.pictures for row in rows)]
    panel_grid(
        [[row.pictures.get(kind) for kind in kinds] for row in rows],
        [COLUMNS[kind] for kind in kinds],
        path,
        row_titles=[row.title for row in rows],
        legend=legend_entries([label for row in rows for label in row.labels], names),
    )


def best_and_worst(images: Iterable[ImageScore], best: int, worst: int) -> list[str]:
    """Names of the images that gained most, and of those that gained least, by falling gain.

    Images without a gain do not count, and none is named twice.
    """
    known = [image for image in images if not math.isnan(image.gain)]
    ranked = [image.name for image in sorted(known, key=lambda image: (-image.gain, image.name))]
    return ranked[:best] + ranked[max(best, len(ranked) - worst) :]


def _check_options(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != SUFFIX:
        raise InputError(f"--output is '{args.output}'; the picture is a PNG: give a name in .png")
    counted = args.best is not None or args.worst is not None
    ranked = counted or args.report is not None
    if sum((ranked, args.names is not None, args.count is not None)) > 1:
        raise InputError(
            "--names, --count and --best, --worst, --report exclude each other; say in one way "
            "which images to draw"
        )
    if ranked and args.ground_truth is None and args.report is None:
        raise InputError(
            "--best and --worst need to know what the images gained: give --ground-truth DIR, or "
            "--report FILE of 's4m-sepl evaluate --json FILE'"
        )
    if counted and not (args.best or args.worst):
        raise InputError("--best and --worst leave nothing to draw; give one of them a number")


def _chosen(
    args: argparse.Namespace, inputs: Inputs
) -> tuple[list[str], dict[str, ImageScore], dict[str, str]]:
    """Names of the images to draw, the scores known so far, and problems of images."""
    if args.names is not None:
        return args.names, {}, {}
    names = inputs.names()
    if args.count is not None or not (inputs.has_truth or args.report):
        return evenly_spaced(names, args.count or COUNT), {}, {}
    if args.report is not None:
        images, problems = read_report(args.report), {}
    else:
        comparison = compare(inputs.folders, names, default_workers())
        images, problems = comparison.images, comparison.problems
    counts = args.best, args.worst
    best, worst = (BEST, WORST) if counts == (None, None) else (count or 0 for count in counts)
    scores = {image.name: image for image in images}
    return best_and_worst(images, best, worst), scores, problems
