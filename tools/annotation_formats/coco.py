"""COCO's file of instances, made from labeled images."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from annotation_formats.shapes import LabeledImage, Mask, Polygon
from s4m_d2.data.images import IMAGE_EXTENSIONS, READ_ERRORS, find_below, image_size
from s4m_d2.data.segmentations import read_polygons
from s4m_d2.errors import DatasetError, first_names, printable
from s4m_d2.files import atomic_write

_DECIMALS = 3


class CocoFile:
    """Collects images below a folder into the content of a COCO file.

    ``classes``: names in the order of their ids; (): those found, sorted. ``unpacked``: names of
    the images that were written to the folder because it lacked them.
    """

    def __init__(self, images: Path, classes: Sequence[str] = ()) -> None:
        self.unpacked: list[str] = []
        self._root = Path(os.path.abspath(images))
        self._classes = tuple(classes)
        self._left_out: dict[str, list[str]] = {}  # reason → places
        self._images: dict[str, dict] = {}  # by name
        self._annotations: list[dict] = []  # category_id is the name until the end

    def add(self, image: LabeledImage, source: str) -> None:
        """Take an image, or name why not; the same for each of its instances."""
        where = f"{source}: {image.name or 'an image without a name'}"
        for place, reason in image.left_out:
            self.leave_out(f"{where}, {place}", reason)
        try:
            record = self._add_image(image)
        except DatasetError as error:
            self.leave_out(where, str(error))
            return
        for label, parts in image.instances:
            try:
                self._add_instance(record, label, parts)
            except DatasetError as error:
                self.leave_out(f"{where}, '{label}'", str(error))

    def leave_out(self, place: str, reason: str) -> None:
        """Note what was left out and why."""
        self._left_out.setdefault(reason, []).append(place)

    def left_out(self) -> Iterator[str]:
        """A line for each reason: how often, and the first places."""
        for reason, places in self._left_out.items():
            named = first_names(places, 3, "; ")
            yield printable(f"{len(places)} left out: {reason} ({named})")

    def content(self) -> dict:
        """Of the COCO file; DatasetError: there is no instance, and what was left out."""
        if not self._annotations:
            remedy = "Give VIA's JSON file or LabelMe's folder, and --images."
            count = f"{len(self._images)} images and no instance: nothing is written. {remedy}"
            raise DatasetError(*self.left_out(), count)
        names = self._classes or sorted({row["category_id"] for row in self._annotations})
        ids = {name: number for number, name in enumerate(names, start=1)}
        return {
            "images": list(self._images.values()),
            "annotations": [{**r, "category_id": ids[r["category_id"]]} for r in self._annotations],
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
        }

    def _add_image(self, image: LabeledImage) -> dict:
        path = self._find(image)
        name = path.relative_to(self._root).as_posix()
        if name in self._images:
            raise DatasetError(f"{name} was annotated before")
        height, width = image_size(str(path))
        if image.size not in (None, (height, width)):
            raise DatasetError(
                f"the image has (height, width) {(height, width)}, its annotations are for "
                f"{image.size}: it was resized, or annotated without its EXIF rotation"
            )
        record = {"id": len(self._images) + 1, "file_name": name, "height": height, "width": width}
        self._images[name] = record
        return record

    def _find(self, image: LabeledImage) -> Path:
        """The image by as much of its path's end as there is, or one with another suffix."""
        parts = Path(image.name).parts
        paths = [self._root.joinpath(*parts[start:]) for start in range(len(parts))]
        if image.folder is not None:
            paths.insert(0, image.folder / image.name)
        places = [Path(os.path.abspath(path)) for path in paths]
        places = [place for place in places if self._root in place.parents]
        given = os.path.relpath(paths[0], self._root) if image.folder else image.name
        if found := find_below(str(self._root), given):
            return self._root / found
        for place in places:
            same = self._by_stem.get(place.with_suffix(""), [])
            if len(same) > 1:
                raise DatasetError(f"{' and '.join(p.name for p in same)} may both be the image")
            if same:
                return same[0]
        if not places or not image.embedded:
            raise DatasetError(f"there is no such image in {self._root}")
        return self._unpack(image.embedded, places[0])

    @cached_property
    def _by_stem(self) -> dict[Path, list[Path]]:
        found: dict[Path, list[Path]] = {}
        for path in sorted(self._root.rglob("*")):
            if path.suffix.lower() in IMAGE_EXTENSIONS:
                found.setdefault(path.with_suffix(""), []).append(path)
        return found

    def _unpack(self, embedded: str, place: Path) -> Path:
        """Write an embedded image to ``place``, with a suffix that its format has."""
        try:
            data = base64.b64decode(embedded)
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
                form = picture.format
        except READ_ERRORS as error:
            raise DatasetError(f"its embedded image cannot be read ({error})") from error
        formats = Image.registered_extensions()
        suffixes = (place.suffix.lower(), *IMAGE_EXTENSIONS)
        suffix = next((suffix for suffix in suffixes if formats.get(suffix) == form), None)
        if suffix is None:
            raise DatasetError(f"its embedded image is of the format {form}")
        place = place.with_suffix(suffix)
        try:
            os.lstat(place)
        except FileNotFoundError:
            with atomic_write(place, "wb") as file:
                file.write(data)
            self.unpacked.append(place.relative_to(self._root).as_posix())
        except (OSError, ValueError) as error:
            raise DatasetError(f"no file can have its name ({error})") from error
        return place

    def _add_instance(self, image: dict, label: str, parts: list[Polygon | Mask]) -> None:
        if self._classes and label not in self._classes:
            raise DatasetError("its class is not one of --classes")
        size = image["height"], image["width"]
        polygons = [part for part in parts if not isinstance(part, Mask)]
        masks = [part for part in parts if isinstance(part, Mask)]
        read_polygons(polygons, size)  # refuses what cannot be drawn
        rows = mask_utils.frPyObjects(polygons, *size) if polygons else []
        whole = mask_utils.merge(rows + [mask_utils.encode(_drawn(m, size)) for m in masks])
        area = float(mask_utils.area(whole))
        if not area:
            raise DatasetError("it covers no pixel")
        annotation = {
            "id": len(self._annotations) + 1,
            "image_id": image["id"],
            "category_id": label,
            "segmentation": [[round(value, _DECIMALS) for value in p] for p in polygons],
            "bbox": mask_utils.toBbox(whole).tolist(),
            "area": area,
            "iscrowd": 0,
        }
        if masks:
            annotation["segmentation"] = {"size": size, "counts": whole["counts"].decode()}
        self._annotations.append(annotation)


def _drawn(mask: Mask, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8, as COCO's API orders it."""
    canvas = np.zeros(size, dtype=np.uint8, order="F")
    places = np.argwhere(mask.pixels) + (mask.y, mask.x)
    rows, columns = places[((places >= 0) & (places < size)).all(axis=1)].T
    canvas[rows, columns] = 1
    return canvas
