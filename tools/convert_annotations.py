#!/usr/bin/env python
"""Convert annotations of VIA 2 (a JSON file) or LabelMe (a folder of JSON files) to COCO's JSON.

    python tools/convert_annotations.py via.json --images photos --output annotations.json
    python tools/convert_annotations.py labelme_folder --images photos --output annotations.json

Polygons, rectangles, circles and (VIA) ellipses become polygons. What cannot be converted is named
and left out, the rest is written; the exit status is 1 if anything was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pycocotools import mask as mask_utils

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from annotation_formats import LabeledImage, Polygon, read_labelme, read_via  # noqa: E402

from s4m_d2.data.images import image_size  # noqa: E402
from s4m_d2.data.segmentations import check_segmentation  # noqa: E402
from s4m_d2.errors import DatasetError, OutputError  # noqa: E402
from s4m_d2.files import atomic_write  # noqa: E402

_DECIMALS = 3


class Converter:
    """Collects images into the content of a COCO file.

    Args:
        images: folder that file names start from.
        classes: names in the order of their ids; (): those found, sorted.
    """

    def __init__(self, images: Path, classes: Sequence[str] = ()) -> None:
        self.problems: list[str] = []
        self._root = Path(os.path.abspath(images))
        self._classes = tuple(classes)
        self._names: set[str] = set()
        self._images: list[dict] = []
        self._annotations: list[dict] = []  # category_id is the name until the end

    def add(self, image: LabeledImage, source: str) -> None:
        """Take an image, or name why not; the same for each of its instances."""
        where = f"{source}: {image.name or 'an image without a name'}"
        self.problems += [f"{where}: {problem}" for problem in image.problems]
        path = self._find(image)
        if path is None:
            self.problems.append(f"{where} is left out: there is no such image in {self._root}")
            return
        name = path.relative_to(self._root).as_posix()
        if name in self._names:
            self.problems.append(f"{where} is left out: {name} was annotated before")
            return
        try:
            height, width = image_size(str(path))
        except DatasetError as error:
            self.problems.append(f"{where} is left out: {error}")
            return
        if image.size not in (None, (height, width)):
            self.problems.append(
                f"{where} is left out: the image has (height, width) {(height, width)}, its "
                f"annotations are for {image.size}"
            )
            return
        number = len(self._images) + 1
        self._names.add(name)
        self._images.append({"id": number, "file_name": name, "height": height, "width": width})
        for label, polygons in image.instances:
            self._add_instance(number, label, polygons, (height, width), where)

    def _find(self, image: LabeledImage) -> Path | None:
        """The image below the folder, by its path, or else by its name alone."""
        if not image.name:
            return None
        starts = [folder for folder in (image.folder, self._root) if folder is not None]
        places = [start / image.name for start in starts] + [self._root / Path(image.name).name]
        for place in (Path(os.path.abspath(place)) for place in places):
            if place.is_file() and place.is_relative_to(self._root):
                return place
        return None

    def _add_instance(
        self, image_id: int, label: str, polygons: list[Polygon], size: tuple[int, int], where: str
    ) -> None:
        if self._classes and label not in self._classes:
            self.problems.append(f"{where}: '{label}' is left out: it is not one of --classes")
            return
        try:
            check_segmentation(polygons, size)
        except DatasetError as error:
            self.problems.append(f"{where}: '{label}' is left out: {error}")
            return
        whole = mask_utils.merge(mask_utils.frPyObjects(polygons, *size))
        area = float(mask_utils.area(whole))
        if not area:
            self.problems.append(f"{where}: '{label}' is left out: it covers no pixel")
            return
        annotation = {
            "id": len(self._annotations) + 1,
            "image_id": image_id,
            "category_id": label,
            "segmentation": [[round(value, _DECIMALS) for value in p] for p in polygons],
            "bbox": mask_utils.toBbox(whole).tolist(),
            "area": area,
            "iscrowd": 0,
        }
        self._annotations.append(annotation)

    def content(self) -> dict:
        """Of the COCO file.

        Raises:
            DatasetError: there is no image or no instance.
        """
        if not self._annotations:
            raise DatasetError(
                f"{len(self._images)} images and no instance were found: nothing is written. Give "
                "VIA's JSON file or LabelMe's folder, and --images."
            )
        found = {row["category_id"] for row in self._annotations}
        names = self._classes or tuple(sorted(found))
        ids = {name: number for number, name in enumerate(names, start=1)}
        annotations = [{**r, "category_id": ids[r["category_id"]]} for r in self._annotations]
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        return {"images": self._images, "annotations": annotations, "categories": categories}


def labeled_images(
    source: Path, class_attribute: str, problems: list[str]
) -> Iterator[tuple[LabeledImage, str]]:
    """(image, where it was found) of a VIA file or of the LabelMe files below a folder.

    Files that cannot be read are added to ``problems``.

    Raises:
        DatasetError: there is no such file or folder, or no JSON file in it.
    """
    if source.is_file():
        try:
            yield from ((image, source.name) for image in read_via(source, class_attribute))
        except ValueError as error:
            raise DatasetError(f"{source}: {error}.") from error
        return
    files = sorted(source.rglob("*.json"))
    if not files:
        raise DatasetError(
            f"{source} is neither a JSON file (VIA) nor a folder with JSON files (LabelMe)."
        )
    for file in files:
        try:
            yield read_labelme(file), file.relative_to(source).as_posix()
        except ValueError as error:
            problems.append(f"{file} is left out: {error}")


def convert(
    source: Path,
    images: Path,
    output: Path,
    *,
    classes: Sequence[str] = (),
    class_attribute: str = "",
    overwrite: bool = False,
) -> tuple[dict, list[str]]:
    """Write the COCO file; return its content and what was left out.

    Raises:
        DatasetError: nothing can be converted, or ``output`` exists and ``overwrite`` is off.
        OutputError: the system refuses to write.
    """
    if os.path.lexists(output) and not overwrite:
        raise DatasetError(f"{output} exists. Choose another --output, or add --overwrite.")
    if not images.is_dir():
        raise DatasetError(f"--images: {images} is no folder.")
    converter = Converter(images, classes)
    for image, where in labeled_images(source, class_attribute, converter.problems):
        converter.add(image, where)
    content = converter.content()
    with atomic_write(output) as file:
        json.dump(content, file)
    return content, converter.problems


def summary(content: dict) -> str:
    """Numbers of images and of each class's instances."""
    counts = {row["id"]: 0 for row in content["categories"]}
    for row in content["annotations"]:
        counts[row["category_id"]] += 1
    parts = [f"{row['name']} {counts[row['id']]}" for row in content["categories"]]
    images = len(content["images"])
    return f"{images} images, {len(content['annotations'])} instances ({', '.join(parts)})"


def main(arguments: Iterable[str] | None = None) -> int:
    """Command line; returns the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("source", type=Path, help="VIA's JSON file, or LabelMe's folder")
    parser.add_argument("--images", type=Path, help="folder of the images (default: the source's)")
    parser.add_argument("--output", type=Path, required=True, help="the COCO file")
    words = "these classes only, in this order: the same for all files of a data set"
    parser.add_argument("--classes", nargs="+", default=(), metavar="NAME", help=words)
    words = "VIA's region attribute that names the class"
    parser.add_argument("--class-attribute", default="", metavar="NAME", help=words)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    args = parser.parse_args(arguments)
    images = args.images or (args.source if args.source.is_dir() else args.source.parent)
    try:
        content, problems = convert(
            args.source,
            images,
            args.output,
            classes=args.classes,
            class_attribute=args.class_attribute,
            overwrite=args.overwrite,
        )
    except (DatasetError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{args.output}: {summary(content)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
