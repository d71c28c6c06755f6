"""Check a download of Cityscapes; prints what is missing and where to get it.

    python datasets/prepare_cityscapes.py [--root datasets]

Needed: leftImg8bit and gtFine, train and val. Nothing is converted, copied or linked; the exit
status is 0 if the data set is complete, else 1.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

EXPECTED = {"train": 2975, "val": 500}
IMAGE_SUFFIX = "_leftImg8bit.png"
ANNOTATION_SUFFIXES = (
    "_gtFine_instanceIds.png",  # training and evaluation
    "_gtFine_labelIds.png",  # evaluation
    "_gtFine_polygons.json",  # Detectron2's loader of the val set
)
ARCHIVES = {
    "leftImg8bit": "leftImg8bit_trainvaltest.zip (11 GB)",
    "gtFine": "gtFine_trainvaltest.zip (241 MB)",
}
DOWNLOAD = "https://www.cityscapes-dataset.com/downloads/ (free, after registration)"
SHOWN = 3


def check(root: Path, expected: Mapping[str, int] = EXPECTED) -> list[str]:
    """Everything that is wrong below ``root/cityscapes``; empty if it is complete.

    Args:
        root: what DETECTRON2_DATASETS names.
        expected: number of images of each split.
    """
    folder = root / "cityscapes"
    problems = [_missing_part(root, part) for part in ARCHIVES if not (folder / part).is_dir()]
    if problems:
        return problems
    for split, count in expected.items():
        problems += _check_split(folder, split, count)
    return problems


def _missing_part(root: Path, part: str) -> str:
    folder, archive = root / "cityscapes", ARCHIVES[part].split()[0]
    for place in (folder, root):
        if (place / archive).is_file():
            return f"{place / archive} is not unpacked: run  unzip -d {folder} {place / archive}"
    return f"{folder / part} is missing: get {ARCHIVES[part]} from {DOWNLOAD}, unpack in {folder}"


def _check_split(folder: Path, split: str, count: int) -> list[str]:
    problems = []
    images = _stems(folder / "leftImg8bit" / split, IMAGE_SUFFIX)
    if len(images) != count:
        problems.append(
            f"leftImg8bit/{split} has {len(images)} images, expected {count}: "
            f"unpack {ARCHIVES['leftImg8bit']} again; source: {DOWNLOAD}"
        )
    for suffix in ANNOTATION_SUFFIXES:
        annotations = _stems(folder / "gtFine" / split, suffix)
        problems += _unpaired(f"gtFine/{split}/*{suffix}", images - annotations, "gtFine")
        problems += _unpaired(
            f"leftImg8bit/{split}/*{IMAGE_SUFFIX}", annotations - images, "leftImg8bit"
        )
    return problems


def _unpaired(pattern: str, missing: set[str], part: str) -> list[str]:
    if not missing:
        return []
    stems = sorted(missing)
    shown = ", ".join(stems[:SHOWN]) + (", ..." if len(stems) > SHOWN else "")
    return [
        f"{pattern} lacks {len(stems)} files whose partner is there ({shown}): "
        f"unpack {ARCHIVES[part]} again; source: {DOWNLOAD}"
    ]


def _stems(folder: Path, suffix: str) -> set[str]:
    """``CITY/name`` of the non-empty files CITY/name + suffix."""
    return {
        path.relative_to(folder).as_posix()[: -len(suffix)]
        for path in folder.glob(f"*/*{suffix}")
        if path.stat().st_size
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; 0 if the data set is complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("DETECTRON2_DATASETS", "datasets")
    parser.add_argument("--root", default=default, help="folder that holds cityscapes/")
    root = Path(parser.parse_args(arguments).root).expanduser()
    problems = check(root)
    for problem in problems:
        print(f"missing: {problem}")
    if not problems:
        print(f"{root / 'cityscapes'} is complete: {EXPECTED} images with all annotations.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
