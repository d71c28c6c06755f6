"""Reader of COCO files of instances, for training, evaluation and drawing.

A file is parsed once per process. Common deviations of annotation tools are corrected; unusable
annotations are left out and counted, or refused, all in one report.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_utils

from s4m_d2.data.findings import CROWDS, Findings
from s4m_d2.data.images import image_size
from s4m_d2.data.segmentations import as_polygons, compressed_rle, read_polygons
from s4m_d2.errors import DatasetError

_KEPT_FILES = 4  # cached results
_LARGE = 1 << 24  # px: the size of larger images is verified in their files
_ENCODINGS = ("gb18030", "shift_jis", "cp1252")  # candidates for a file that is not UTF-8

Choose = Callable[[Sequence[str]], Collection[str]]
Key = int | str | None


@dataclass(frozen=True)
class Annotations:
    """Normalized content of a COCO file, or of a part of its images.

    Attributes:
        json_file, image_root: path of the file, and the folder to which file names are relative.
        categories: (id, name) in the order of class indices.
        records: Detectron2's, one for each image: "file_name" (a path), "image_id" (an int),
            "height", "width", and "annotations" with "category_id" (class index), "segmentation"
            (flat polygons, or compressed RLE of the image's size, with at least one pixel),
            "bbox" (XYWH in pixels), "area" (px), "iscrowd" (0 or 1).
        findings: about the whole file.
    """

    json_file: str
    image_root: str
    categories: tuple[tuple[int, str], ...]
    records: tuple[dict, ...]
    findings: Findings = field(compare=False)

    @property
    def classes(self) -> list[str]:
        """Names in the order of class indices."""
        return [name for _, name in self.categories]

    def metadata(self) -> dict[str, Any]:
        """Metadata of the classes for Detectron2's evaluators, and the findings."""
        ids = {number: index for index, (number, _) in enumerate(self.categories)}
        return {
            "thing_classes": self.classes,
            "thing_dataset_id_to_contiguous_id": ids,
            "findings": self.findings,
        }

    def name(self, record: dict) -> str:
        """A record's path below the folder of images."""
        return record["file_name"].removeprefix(os.path.join(self.image_root, ""))

    def part(self, names: Collection[str]) -> Annotations:
        """Keep only the images with these names."""
        records = tuple(record for record in self.records if self.name(record) in names)
        return Annotations(self.json_file, self.image_root, self.categories, records, self.findings)

    def instances(self) -> Iterable[tuple[dict, dict]]:
        """Each (record, annotation) without crowds."""
        for record in self.records:
            for annotation in record["annotations"]:
                if not annotation["iscrowd"]:
                    yield record, annotation

    def to_coco(self) -> dict:
        """Content of a COCO file for COCO's evaluation; annotation ids start at 1, as its API
        treats a match with id 0 as none."""
        images: list[dict] = []
        annotations: list[dict] = []
        for record in self.records:
            size = {side: record[side] for side in ("height", "width")}
            images.append({"id": record["image_id"], "file_name": self.name(record), **size})
            for annotation in record["annotations"]:
                row = {**annotation, "id": len(annotations) + 1, "image_id": record["image_id"]}
                row["category_id"] = self.categories[annotation["category_id"]][0]
                del row["bbox_mode"]
                annotations.append(row)
        categories = [{"id": number, "name": name} for number, name in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


def read_annotations(
    json_file: str,
    image_root: str,
    *,
    classes: Sequence[str] = (),
    choose: Choose | None = None,
    remedy: str = "",
    strict: bool = True,
) -> Annotations:
    """Read a COCO file of instances; an unchanged file is parsed once per process.

    Args:
        json_file, image_root: paths.
        classes: expected names of the categories, in the order of class indices; (): the file's
            own, in the order of their ids.
        choose: file names of all images -> file names of the wanted images; only their annotations
            are read. None: all.
        remedy: end of the message about a missing file or image.
        strict: False: return the usable part of a file with problems, which are in the findings.

    Raises:
        DatasetError: the file is missing, malformed, of another kind, has other classes, or has no
            usable instance; a chosen image is missing. All problems in one message.
    """
    try:
        state = os.stat(json_file)
    except OSError as error:
        raise DatasetError(f"{json_file}: {error.strerror}. {remedy}".strip()) from error
    stamp = (state.st_mtime_ns, state.st_size)
    collects = gc.isenabled()
    gc.disable()  # it would traverse millions of new objects repeatedly
    try:
        return _read(json_file, stamp, image_root, tuple(classes), choose, remedy, strict)
    finally:
        if collects:
            gc.enable()


@functools.lru_cache(_KEPT_FILES)
def _read(
    json_file: str,
    stamp: Hashable,  # of the file's content
    image_root: str,
    classes: tuple[str, ...],
    choose: Choose | None,
    remedy: str,
    strict: bool,
) -> Annotations:
    content = _load(json_file)
    findings = Findings()
    rows = _objects(content, "annotations", findings)
    images = _images(_objects(content, "images", findings), findings)
    categories, indices = _categories(content, rows, classes, json_file, findings)
    chosen = _chosen(images, choose, image_root, findings, remedy)
    by_image: dict[Key, list[dict]] = defaultdict(list)
    for row in rows:
        key = _key(row.get("image_id"))
        if key in chosen:
            by_image[key].append(row)
        elif key not in images:
            text = "annotations of images that are not listed"
            findings.leave_out(text, _label(row), "They are left out: list these images.")
    if len({repr(row.get("id")) for row in rows}) < len(rows):
        findings.notes.append("ids of annotations are missing or repeat: counted anew")
    numbered = all(isinstance(key, int) for key in images)
    records: list[dict[str, Any]] = []
    for position, key in enumerate(images, start=1):
        if key not in chosen:
            continue
        path, size = chosen[key]
        found = [_annotation(row, size, indices, findings) for row in by_image[key]]
        record = {
            "file_name": path,
            "image_id": key if numbered else position,
            "height": size[0],
            "width": size[1],
            "annotations": [annotation for annotation in found if annotation],
        }
        records.append(record)
    if strict:
        findings.raise_for(json_file)
    if numbered:
        records.sort(key=lambda record: record["image_id"])  # Detectron2's order
    gc.freeze()  # excludes the records from collections: they live as long as the process
    return Annotations(json_file, image_root, categories, tuple(records), findings)


def _load(json_file: str) -> dict:
    """The object of a JSON file, if it can be one of instances."""
    try:
        content = json.loads(Path(json_file).read_bytes())  # UTF-8, 16 or 32, with BOM or without
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{json_file} is no UTF-8 text{_encoding(json_file)}. Save it as UTF-8."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{json_file} is no valid JSON: {error}. Export it again, or correct it."
        ) from error
    give = "Give a COCO json of instances, such as instances_train2017.json."
    if not isinstance(content, dict):
        known = isinstance(content, list) and content and isinstance(content[0], dict)
        kind = "a list of predictions" if known and "score" in content[0] else "no JSON object"
        raise DatasetError(f"{json_file} is {kind}, no COCO file of annotations. {give}")
    for section in ("images", "annotations", "categories"):
        if not isinstance(content.get(section), list):
            only = section == "annotations" and "images" in content
            kind = "a list of images alone (COCO's image_info)" if only else "no COCO file"
            raise DatasetError(f"{json_file} has no list '{section}': it is {kind}. {give}")
    rows = [row for row in content["annotations"] if isinstance(row, dict)]
    for key, kind in (("segments_info", "panoptic segments"), ("keypoints", "keypoints")):
        if rows and all(key in row and "segmentation" not in row for row in rows):
            raise DatasetError(f"{json_file} is a COCO file of {kind}, not of instances. {give}")
    return content


def _encoding(json_file: str) -> str:
    for encoding in _ENCODINGS:
        try:
            Path(json_file).read_text(encoding=encoding)
        except UnicodeDecodeError:
            continue
        return f"; it may be {encoding}"
    return ""


def _objects(content: dict, section: str, findings: Findings) -> list[dict]:
    for position, row in enumerate(content[section]):
        if not isinstance(row, dict):
            text = f"entries of '{section}' are no objects"
            findings.refuse(text, f"#{position}", "Remove them.")
    return [row for row in content[section] if isinstance(row, dict)]


def _is_name(value: Any) -> bool:
    """Whether it is a text without lone surrogates, which cannot be encoded."""
    if not isinstance(value, str) or not value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _key(value: Any) -> Key:
    """Normalize an id (1, 1.0 and "1" are equal); None: not an id."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return int(value) if value.isdecimal() and value.isascii() and len(value) < 19 else value
    return None


def _label(annotation: dict) -> str:
    """Name of an annotation in messages."""
    if "id" in annotation:
        return f"id {annotation['id']}"
    return f"without id, of image {annotation.get('image_id')}"


def _number(value: Any) -> float | None:
    """Parse a finite number, which may be text; None: not a number."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _images(rows: Sequence[dict], findings: Findings) -> dict[Key, dict]:
    """The file's images by id; repeated ids and files are refused."""
    images: dict[Key, dict] = {}
    first: dict[str, Any] = {}
    for row in rows:
        name, key = row.get("file_name"), _key(row.get("id"))
        shown = reprlib.repr(name)
        if not _is_name(name) or "\0" in str(name):
            findings.refuse("images have no usable file_name", shown, "Write a text there.")
        elif key is None:
            findings.refuse("images have no usable id", shown, "Number the images.")
        elif name in first:
            names = f"{name}, ids {first[name]} and {row['id']}"
            findings.refuse("images are listed twice", names, "Remove one of each.")
        elif key in images:
            names = f"id {row['id']}: {images[key]['file_name']} and {name}"
            findings.refuse("ids are of two images", names, "Number the images anew.")
        else:
            images[key], first[str(name)] = row, row["id"]
    return images


def _categories(
    content: dict, rows: Sequence[dict], classes: Sequence[str], json_file: str, findings: Findings
) -> tuple[tuple[tuple[int, str], ...], dict[Key, int]]:
    """(id, name) of each class in the order of class indices, and from ids to class indices."""
    named: dict[Key, str] = {}
    parents = set()
    for position, row in enumerate(_objects(content, "categories", findings)):
        key, name = _key(row.get("id")), row.get("name")
        name = str(name) if isinstance(name, int) else name
        if key is None or not _is_name(name):
            findings.refuse("categories lack an id or a name", f"#{position}", "Complete them.")
        elif key in named:
            both = f"id {row['id']}: {named[key]} and {name}"
            findings.refuse("ids are of two categories", both, "Number the categories anew.")
        else:
            named[key] = str(name)
        parent = row.get("supercategory")
        if isinstance(parent, str) and parent != name:
            parents.add(parent)
    used = {_key(row.get("category_id")) for row in rows}
    again = Counter(named.values())
    for key, name in [*named.items()]:
        superfluous = (
            again[name] > 1 or (name in parents and used) or (classes and name not in classes)
        )
        if key not in used and superfluous:
            findings.notes.append(f"unused category {name} (id {key}) dropped")
            again[name] -= 1
            del named[key]
    for name in (name for name, count in again.items() if count > 1):
        findings.refuse("names are of two categories", name, "Tell classes apart by their names.")
    if not named:
        raise DatasetError(f"{json_file}: 'categories' is empty. List the classes there.")
    order = sorted(named, key=lambda key: (isinstance(key, str), key))
    names = list(classes) or [named[key] for key in order]
    strange = sorted({*named.values()} - {*names})
    if strange:
        raise DatasetError(
            f"{json_file} has annotations of the categories {', '.join(strange)}; expected "
            f"{', '.join(names)}. Write the same names in both files (their ids may differ)."
        )
    indices = {key: names.index(name) for key, name in named.items()}
    lacking = [name for name in names if name not in named.values()]
    if lacking:
        findings.notes.append(f"no category {', '.join(lacking)}: its AP is nan")
    ids = {index: key for key, index in indices.items() if isinstance(key, int)}
    if len(ids) < len(indices):
        return tuple(enumerate(names, start=1)), indices
    fresh = max(ids.values(), default=0) + 1
    return tuple((ids.get(i, fresh + i), name) for i, name in enumerate(names)), indices


def _listed_size(image: dict) -> tuple[int, int] | None:
    """(H, W), if whole numbers of pixels are listed."""
    height, width = (_number(image.get(side)) or 0.0 for side in ("height", "width"))
    is_whole = min(height, width) >= 1 and height.is_integer() and width.is_integer()
    return (int(height), int(width)) if is_whole else None


def _chosen(
    images: dict[Key, dict],
    choose: Choose | None,
    image_root: str,
    findings: Findings,
    remedy: str,
) -> dict[Key, tuple[str, tuple[int, int]]]:
    """Path and (H, W) of the chosen images that are there, by their ids."""
    by_name = {image["file_name"]: key for key, image in images.items()}
    names = choose(list(by_name)) if choose else list(by_name)
    chosen, missing, unsized = {}, [], 0
    for given in names:
        image = images[by_name[given]]
        path = os.path.join(image_root, given)
        if "\\" in given and not os.path.exists(path):
            path = os.path.join(image_root, given.replace("\\", "/"))
        name = os.path.relpath(path, image_root)
        path = os.path.join(image_root, name)
        size = _listed_size(image)
        if name.split(os.sep)[0] == os.pardir:
            advice = f"Write them relative to the folder of images, {image_root}."
            findings.refuse("file names lead out of the folder of images", given, advice)
        elif not os.path.isfile(path):
            missing.append(name)
        elif size and size[0] * size[1] <= _LARGE:
            chosen[by_name[given]] = path, size
        else:
            unsized += size is None
            try:
                actual = image_size(path)
            except DatasetError as error:
                findings.refuse("images cannot be read", error, "")
                continue
            if size and size != actual:
                where = f"{name}, {size} instead of {actual}"
                advice = "Correct the (height, width)."
                findings.refuse("images have another size in their file", where, advice)
            else:
                chosen[by_name[given]] = path, actual
    if unsized:
        findings.notes.append(f"sizes of {unsized:,} images taken from their files")
    if missing:
        base = os.path.basename(missing[0])
        found = (os.path.join(folder, base) for folder, _, n in os.walk(image_root) if base in n)
        below = next(found, None)
        advice = f"{base} lies at {below}: write the sub-folders too. " * bool(below) + remedy
        for name in missing:
            findings.refuse(f"of {len(names):,} images are not in {image_root}", name, advice)
    return chosen


def _annotation(
    row: dict, size: tuple[int, int], indices: dict[Key, int], findings: Findings
) -> dict | None:
    """An annotation of an image of (H, W), normalized; None, and counted, if it cannot be used."""
    label, flag, index = _label(row), row.get("iscrowd"), indices.get(_key(row.get("category_id")))
    crowd = 0 if flag is None else _number(flag)
    if crowd not in (0, 1):
        findings.refuse("annotations have an iscrowd that is not 0 or 1", label, "Correct it.")
        return None
    if index is None:
        text = "annotations have a category_id that the file does not define"
        category = f"{label}: {reprlib.repr(row.get('category_id'))}"
        findings.refuse(text, category, "Remove them, or complete 'categories'.")
        return None
    try:
        shape = _shape(row.get("segmentation"), size, label, findings)
    except DatasetError as error:
        text, where = "segmentations cannot be drawn", f"{label} ({error})"
        findings.refuse(text, where, "Correct or remove them.")
        return None
    if not shape:
        text = "annotations without a mask"
        findings.leave_out(text, label, "They are left out: draw masks for them, or remove them.")
        return None
    is_rle = isinstance(shape, dict)
    rle = shape if is_rle else mask_utils.merge(mask_utils.frPyObjects(shape, *size))
    area = float(mask_utils.area(rle))
    if not area:
        remedy = (
            "They are left out. Coordinates from 0 to 1 have to be multiplied by the image's width "
            "and height; others are those of another image, or of one of another size."
        )
        where = f"{label} ({_extent(shape, size)})"
        findings.leave_out("masks without a pixel in their image", where, remedy)
        return None
    if crowd:
        remedy = "Nothing is learned from them. Set iscrowd to 0 where each is one object."
        findings.leave_out(CROWDS, label, remedy)
    findings.instances += not crowd
    given = _number(row.get("area"))
    return {
        "iscrowd": int(crowd),
        "category_id": index,
        "segmentation": shape if is_rle else [part.tolist() for part in shape],
        "area": given if given and given > 0 else area,
        "bbox": _box(row.get("bbox")) or mask_utils.toBbox(rle).tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
    }


def _shape(
    segmentation: Any, size: tuple[int, int], label: str, findings: Findings
) -> list[np.ndarray] | dict:
    """Flat polygons of three points and more, or compressed RLE; empty where there is no mask."""
    if isinstance(segmentation, dict):
        return compressed_rle(segmentation, size) if segmentation.get("counts") else {}
    if not isinstance(segmentation, list | None):
        raise DatasetError("expected polygons or an RLE")
    parts = as_polygons(segmentation or [])
    polygons = read_polygons(parts, size)
    for _ in parts[len(polygons) :] if polygons else ():
        text = "polygons of less than three points"
        findings.leave_out(text, label, "They are left out: complete them.")
    return polygons


def _extent(shape: list[np.ndarray] | dict, size: tuple[int, int]) -> str:
    """Describe the position of a mask without a pixel."""
    if isinstance(shape, dict):
        return "an empty RLE"
    points = np.concatenate(shape).reshape(-1, 2)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    where = f"x from {left:g} to {right:g}, y from {top:g} to {bottom:g}"
    return f"{where} in an image of {size[1]} x {size[0]}"


def _box(values: Any) -> list[float] | None:
    """Parse [x, y, width, height] in pixels; None: malformed."""
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    box = [number for number in numbers if number is not None]
    return box if len(numbers) == len(box) == 4 and box[2] > 0 and box[3] > 0 else None
