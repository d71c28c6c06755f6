#!/usr/bin/env python
"""Convert annotations of VIA 2 (a JSON file) or LabelMe (a folder of JSON files) to COCO's JSON.

    python tools/convert_annotations.py via.json --images photos --output annotations.json
    python tools/convert_annotations.py labelme_folder --images photos --output annotations.json

Polygons, rectangles, circles, ellipses (VIA), rotated rectangles and masks (LabelMe) are converted.
Missing images that are embedded in LabelMe's files are written to the folder. Other annotations are
listed and left out; the exit status is then 1.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from annotation_formats import labelme, via
from annotation_formats.coco import CocoFile
from annotation_formats.shapes import LabeledImage

from s4m_d2.engine.command.arguments import command_parser
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import DatasetError, printable
from s4m_d2.files import write_json


def convert(args: argparse.Namespace) -> tuple[dict, CocoFile]:
    """Write the COCO file; return its content and what was collected for it."""
    if os.path.lexists(args.output) and not args.overwrite:
        raise DatasetError(f"{args.output} exists. Choose another --output, or add --overwrite.")
    if not args.images.is_dir():
        raise DatasetError(f"--images: {args.images} is no folder.")
    coco = CocoFile(args.images, args.classes)
    for file in _files(args.source, args.output):
        name = file.name if file == args.source else file.relative_to(args.source).as_posix()
        try:
            for image in read(file, args.class_attribute, args.class_name):
                coco.add(image, name)
        except DatasetError as error:
            coco.leave_out(name, str(error))
    content = coco.content()
    write_json(args.output, content)
    return content, coco


def _files(source: Path, output: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(f for f in source.rglob("*.json") if f.resolve() != output.resolve())
    files = [f for f in found if not any(p[0] == "." for p in f.relative_to(source).parts)]
    if not files:
        raise DatasetError(
            f"{source} is neither a JSON file (VIA) nor a folder with JSON files (LabelMe)."
        )
    return files


def read(path: Path, class_attribute: str, class_name: str) -> Iterator[LabeledImage]:
    """The images of a JSON file of VIA 2 or LabelMe, whose format shows in its content."""
    try:
        content = json.loads(path.read_bytes())  # UTF-8, or another UTF that its first bytes show
    except UnicodeDecodeError as error:
        raise DatasetError(f"its text is not in UTF-8 ({error}): save it in UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"this is no valid JSON ({error}): export JSON, not CSV") from error
    if labelme.matches(content):
        yield labelme.read(content, path.parent, class_name)
    elif via.matches(content):
        yield from via.read(content, class_attribute, class_name)
    elif isinstance(content, dict) and {"project", "file", "metadata"} <= content.keys():
        raise DatasetError("this is a project of VIA 3: export it there as COCO")
    else:
        raise DatasetError(
            "this is no file of VIA 2 (it has no 'regions') or LabelMe ('shapes'): a COCO json "
            "needs no conversion, and other tools can export one"
        )


def summary(content: dict) -> str:
    """Numbers of images and of each class's instances."""
    counts = Counter(row["category_id"] for row in content["annotations"])
    parts = [f"{row['name']} {counts[row['id']]}" for row in content["categories"]]
    images, instances = len(content["images"]), len(content["annotations"])
    return printable(f"{images} images, {instances} instances ({', '.join(parts)})")


@exit_status
def main(arguments: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("source", type=Path, help="VIA's JSON file, or LabelMe's folder")
    parser.add_argument("--images", type=Path, help="folder of the images (default: the source's)")
    parser.add_argument("--output", type=Path, required=True, help="the COCO file")
    words = "these classes only, in this order: the same for all files of a data set"
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help=words)
    of_instances = parser.add_mutually_exclusive_group()
    words = "VIA's region attribute that names the class"
    of_instances.add_argument("--class-attribute", default="", metavar="NAME", help=words)
    words = "one class for all instances, whatever their labels or attributes"
    of_instances.add_argument("--class-name", default="", metavar="NAME", help=words)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    args = parser.parse_args(arguments)
    source = args.source
    args.images = args.images or (source if source.is_dir() else source.parent)
    content, coco = convert(args)
    reasons = list(coco.left_out())
    for reason in reasons:
        print(reason, file=sys.stderr)
    if coco.unpacked:
        print(f"{args.images}: {len(coco.unpacked)} embedded images were written to it")
    print(f"{args.output}: {summary(content)}")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
