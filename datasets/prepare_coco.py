"""Check a download of COCO 2017; prints what is missing and where to get it.

    python datasets/prepare_coco.py [--root datasets]

Needed: the images of train2017 and val2017 and their instance annotations. Nothing is converted,
copied or linked; the exit status is 0 if the data set is complete, else 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

EXPECTED = {"train": 118287, "val": 5000}
HOST = "http://images.cocodataset.org"
ANNOTATION_ARCHIVE = "annotations_trainval2017.zip"
SHOWN = 3


def check(root: Path, expected: Mapping[str, int] = EXPECTED) -> list[str]:
    """Everything that is wrong below ``root/coco``; empty if it is complete.

    Args:
        root: what DETECTRON2_DATASETS names.
        expected: number of images of each split.
    """
    problems = []
    for split, count in expected.items():
        problems += _check_split(root, split, count)
    return problems


def _check_split(root: Path, split: str, count: int) -> list[str]:
    folder = root / "coco"
    images = folder / f"{split}2017"
    annotations = folder / "annotations" / f"instances_{split}2017.json"
    archive = f"{split}2017.zip"
    problems = []
    present = {entry.name for entry in os.scandir(images)} if images.is_dir() else set()
    if not images.is_dir():
        problems.append(_missing(root, images, archive, f"{HOST}/zips/{archive}"))
    elif len(present) != count:
        problems.append(
            f"{images} holds {len(present)} files, expected {count} images: "
            f"unpack {HOST}/zips/{archive} again"
        )
    source = f"{HOST}/annotations/{ANNOTATION_ARCHIVE}"
    if not annotations.is_file():
        return [*problems, _missing(root, annotations, ANNOTATION_ARCHIVE, source)]
    try:
        listed = {image["file_name"] for image in json.loads(annotations.read_text())["images"]}
    except (ValueError, KeyError, TypeError) as error:
        return [*problems, f"{annotations} is damaged ({error!r}): unpack {source} again"]
    missing = sorted(listed - present)
    if missing and images.is_dir():
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        problems.append(
            f"{images} lacks {len(missing)} images that {annotations.name} lists ({shown}): "
            f"unpack {HOST}/zips/{archive} again"
        )
    return problems


def _missing(root: Path, wanted: Path, archive: str, source: str) -> str:
    folder = root / "coco"
    for place in (folder, root):
        if (place / archive).is_file():
            return f"{place / archive} is not unpacked: run  unzip -d {folder} {place / archive}"
    return f"{wanted} is missing: get {source} and unpack it in {folder}"


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; 0 if the data set is complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser.add_argument("--root", default=default, help="folder that holds coco/")
    root = Path(parser.parse_args(arguments).root).expanduser()
    problems = check(root)
    for problem in problems:
        print(f"missing: {problem}")
    if not problems:
        print(f"{root / 'coco'} is complete: {EXPECTED} images with their annotations.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
