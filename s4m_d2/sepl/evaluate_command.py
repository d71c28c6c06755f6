"""``s4m-sepl evaluate``: IoU of label maps before and after they were enhanced."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s4m_d2.command_line import default_workers, positive, print_problems
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write
from s4m_d2.sepl.classes import LabelClasses, add_class_arguments, classes_from
from s4m_d2.sepl.comparison import (
    AFTER,
    BEFORE,
    TRUTH,
    Comparison,
    ImageScore,
    LabelFolders,
    compare,
)
from s4m_d2.sepl.labels import add_label_arguments
from s4m_d2.sepl.listing import image_list

NO_VALUE = "–"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`run` reads."""
    parser.description = (
        "IoU of each class, mIoU and pixel accuracy over a whole data set, as VOC's benchmark "
        "counts them: background is a class, void in the ground truth is not scored, void in a "
        "label counts as missed."
    )
    parser.add_argument(
        "--enhanced", type=Path, required=True, metavar="DIR", help="label maps under test"
    )
    parser.add_argument(
        "--pseudo-labels",
        type=Path,
        metavar="DIR",
        help="those before the enhancement, to compare with",
    )
    parser.add_argument(
        "--ground-truth", type=Path, required=True, metavar="DIR", help="true label maps"
    )
    add_label_arguments(parser)
    add_class_arguments(parser)
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="names of the images to compare, such as VOC's train.txt (default: all that have a "
        "label; the ground truth may be of more)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write a report, with the mIoU of each image"
    )
    parser.add_argument(
        "--workers",
        type=positive,
        default=default_workers(),
        metavar="N",
        help="threads (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, write the report.

    Returns:
        The exit status: 0, or 1 if images are missing somewhere or could not be compared.

    Raises:
        S4MError: nothing can be compared: a folder or list is missing, classes contradict.
    """
    classes = classes_from(args)
    paths = {TRUTH: args.ground_truth, BEFORE: args.pseudo_labels, AFTER: args.enhanced}
    folders = LabelFolders(paths, classes.num_classes, args.suffix, args.background_score)
    names = None if args.list is None else image_list(args.list)
    comparison = compare(folders, names, args.workers)
    if args.json is not None:
        write_report(args.json, comparison, classes)
    if comparison.images:
        print(score_table(comparison, classes) + "\n")
    print(count_line(comparison))
    print_problems(comparison.problems, "could not be compared")
    return 1 if comparison.problems else 0


def scores(comparison: Comparison, classes: LabelClasses) -> dict[str, Any]:
    """IoU by class name, mIoU and pixel accuracy, each "before", "after" and "gain", in [0, 1].

    Where only the enhanced labels were scored there is "after" alone. nan: the class occurs
    neither in the ground truth nor in the labels.
    """
    after, before = comparison.after, comparison.before
    before_iou = [None] * classes.num_classes if before is None else before.iou().tolist()
    by_class = zip(classes.names, before_iou, after.iou().tolist(), strict=True)
    return {
        "iou": {name: _change(one, other) for name, one, other in by_class},
        "miou": _change(None if before is None else before.miou(), after.miou()),
        "pixel_accuracy": _change(
            None if before is None else before.pixel_accuracy(), after.pixel_accuracy()
        ),
    }


def score_table(comparison: Comparison, classes: LabelClasses) -> str:
    """A Markdown table in percent: a row a class, then mIoU and pixel accuracy."""
    found = scores(comparison, classes)
    values = found["iou"] | {"mIoU": found["miou"], "pixel accuracy": found["pixel_accuracy"]}
    columns = list(found["miou"])
    rows = [["", *columns]]
    for name, changes in values.items():
        cells = [_percent(changes[key], sign="+" if key == "gain" else "") for key in columns]
        rows.append([name.replace("|", r"\|"), *cells])
    return _table(rows)


def count_line(comparison: Comparison) -> str:
    """How many images were compared, and how many of them gained and lost."""
    count = len(comparison.images)
    line = f"{count} image{'s' * (count != 1)}"
    if comparison.before is None:
        return line
    improved, worsened = changed_counts(comparison)
    same = count - improved - worsened
    return f"{line}: {improved} improved, {worsened} worsened, {same} as before"


def changed_counts(comparison: Comparison) -> tuple[int, int]:
    """Images whose own mIoU rose, and fell."""
    gains = [image.gain for image in comparison.images]
    return sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)


def read_report(path: str | os.PathLike[str]) -> list[ImageScore]:
    """The images of a report that :func:`write_report` wrote.

    Raises:
        DatasetError: the file is missing or no such report.
    """
    try:
        with open(path, encoding="utf-8") as file:
            images = json.load(file)["images"]
        return [
            ImageScore(image["name"], _number(image["before"]), _number(image["after"]))
            for image in images
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"{path} is no report of labels before and after ({type(error).__name__}: {error}). "
            "Write one by: s4m-sepl evaluate --pseudo-labels DIR ... --json FILE"
        ) from error


def write_report(
    path: str | os.PathLike[str], comparison: Comparison, classes: LabelClasses
) -> None:
    """Write all that is known as JSON; what is not a number there becomes null.

    "images" has those compared: their "name" and their own mIoU, "before", "after", "gain".
    """
    improved, worsened = changed_counts(comparison)
    images = [
        {"name": image.name, **_change(image.before, image.after)} for image in comparison.images
    ]
    report = {
        "num_images": len(images),
        **({} if comparison.before is None else {"improved": improved, "worsened": worsened}),
        **scores(comparison, classes),
        "images": images,
        "problems": comparison.problems,
    }
    with atomic_write(path) as file:
        json.dump(_plain(report), file, indent=2)
        file.write("\n")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _change(before: float | None, after: float) -> dict[str, float]:
    if before is None:
        return {"after": after}
    return {"before": before, "after": after, "gain": after - before}


def _percent(value: float, sign: str) -> str:
    return NO_VALUE if math.isnan(value) else f"{100 * value:{sign}.2f}"


def _table(rows: list[list[str]]) -> str:
    """Aligned Markdown; the first row is the head, the first column is text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def _plain(value: Any) -> Any:
    """The same with null for what is not finite, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
