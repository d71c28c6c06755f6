"""Reader of COCO files of instances, for training, evaluation and drawing.

A file is parsed once per process. Common deviations of annotation tools are corrected; unusable
annotations are left out and counted, or refused, all in one report.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
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
_ENCODINGS = ("gb18030", "shift_jis", "cp1252")  # candidates for a file that is not UTF-8
_OTHER_KINDS = {"segments_info": "panoptic segments", "keypoints": "keypoints"}
_LARGE = 1 << 24  # px: the size of larger images is verified in their files

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
    rows, findings = content["annotations"], Findings()
    images = _images(content["images"], findings)
    categories, indices = _categories(content["categories"], rows, classes, json_file, findings)
    chosen = _chosen(images, choose, image_root, findings, remedy)
    by_image: dict[Key, list[dict]] = defaultdict(list)
    for row in rows:
        key = _key(row.get("image_id"))
        if key in chosen:
            by_image[key].append(row)
        elif key not in images:
            text = "annotations of images that are not listed"
            findings.leave_out(text, _label(row), "They are left out: list these images.")
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


def _load(json_file: str) -> dict[str, list[dict]]:
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
    for section in ("images", "annotations", "categories"):
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DatasetError(
                f"{json_file} has no list '{section}' of objects. Give a COCO json of instances, "
                "such as instances_train2017.json."
            )
    for key, kind in _OTHER_KINDS.items():
        rows = content["annotations"]
        if rows and all(key in row and "segmentation" not in row for row in rows):
            raise DatasetError(f"{json_file} is a COCO file of {kind}; give one of instances.")
    return content


def _encoding(json_file: str) -> str:
    for encoding in _ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            Path(json_file).read_text(encoding=encoding)
            return f"; it may be {encoding}"
    return ""


def _is_name(value: Any) -> bool:
    """Whether it is a text without lone surrogates, which cannot be encoded."""
    if not isinstance(value, str) or not value or "\0" in value:
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
    """The file's images by id."""
    images: dict[Key, dict] = {}
    by_name: dict[str, dict] = {}
    for row in rows:
        name: Any = row.get("file_name")
        key = _key(row.get("id"))
        shown = f"{name} (id {row.get('id')})"
        if key is None or not _is_name(name):
            findings.refuse("images have no usable file_name and id", shown, "Complete them.")
        elif other := images.get(key) or by_name.get(name):
            both = f"{other['file_name']} (id {other['id']}) and {shown}"
            remedy = "Remove one of each, or number the images anew."
            findings.refuse("images have an id or file_name of another one", both, remedy)
        else:
            images[key] = by_name[name] = row
    return images


def _categories(
    listed: Sequence[dict],
    rows: Sequence[dict],
    classes: Sequence[str],
    json_file: str,
    findings: Findings,
) -> tuple[tuple[tuple[int, str], ...], dict[Key, int]]:
    """(id, name) of each class in the order of class indices, and from ids to class indices."""
    named: dict[Key, str] = {}
    for row in listed:
        key, name = _key(row.get("id")), row.get("name")
        name = str(name) if isinstance(name, int) else name
        if key is None or key in named or not _is_name(name):
            text, shown = "categories lack a name or an id of their own", f"{name!r}"
            findings.refuse(text, f"{shown} (id {row.get('id')})", "Complete or number them anew.")
        else:
            named[key] = str(name)
    parents = {
        repr(parent) for row in listed if (parent := row.get("supercategory")) != row.get("name")
    }
    used = {_key(row.get("category_id")) for row in rows}
    count = Counter(named.values())
    for key, name in [*named.items()]:
        is_parent = used and repr(name) in parents
        is_superfluous = count[name] > 1 or is_parent or (classes and name not in classes)
        if key not in used and is_superfluous:
            findings.notes.append(f"unused category {name} (id {key}) dropped")
            count[name] -= 1
            del named[key]
    for name in (name for name in count if count[name] > 1):
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


def _chosen(
    images: dict[Key, dict],
    choose: Choose | None,
    image_root: str,
    findings: Findings,
    remedy: str,
) -> dict[Key, tuple[str, tuple[int, int]]]:
    """Path and (H, W) of the chosen images that are there, by their ids."""
    by_name = {image["file_name"]: key for key, image in images.items()}
    chosen, missing = {}, []
    for given in choose(list(by_name)) if choose else by_name:
        key = by_name[given]
        path = os.path.join(image_root, given)
        if "\\" in given and not os.path.exists(path):
            path = os.path.join(image_root, given.replace("\\", "/"))
        name = os.path.relpath(path, image_root)
        path = os.path.join(image_root, name)
        if name.split(os.sep)[0] == os.pardir:
            advice = f"Write them relative to the folder of images, {image_root}."
            findings.refuse("file names lead out of the folder of images", given, advice)
        elif not os.path.isfile(path):
            missing.append(name)
        else:
            height, width = (_number(images[key].get(side)) or 0.0 for side in ("height", "width"))
            is_whole = min(height, width) >= 1 and (height % 1, width % 1) == (0, 0)
            size = (int(height), int(width)) if is_whole else None
            try:
                actual = size if size and height * width <= _LARGE else image_size(path)
            except DatasetError as error:
                findings.refuse("images cannot be read", str(error), "")
                continue
            if size not in (None, actual):
                where = f"{name}, {size} instead of {actual}"
                findings.refuse("images have another (height, width)", where, "Correct it.")
            chosen[key] = path, actual
    if missing:
        base = os.path.basename(missing[0])
        found = (folder for folder, _, names in os.walk(image_root) if base in names)
        if below := next(found, None):
            remedy = f"{base} lies in {below}: write the sub-folders too. {remedy}"
        for name in missing:
            findings.refuse(f"images are not in {image_root}", name, remedy)
    return chosen


def _annotation(
    row: dict, size: tuple[int, int], indices: dict[Key, int], findings: Findings
) -> dict | None:
    """An annotation of an image of (H, W), normalized; None, and counted, if it cannot be used."""
    crowd, index = _number(row.get("iscrowd") or 0), indices.get(_key(row.get("category_id")))
    try:
        if crowd not in (0, 1):
            raise DatasetError("iscrowd is not 0 or 1")
        if index is None:
            raise DatasetError(f"'categories' does not list {row.get('category_id')!r}")
        shape = _shape(row, size, findings)
    except DatasetError as error:
        wrong = f"{_label(row)} ({error})"
        findings.refuse("annotations cannot be used", wrong, "Correct or remove them.")
        return None
    if not shape:
        advice = "They are left out: draw masks for them, or remove them."
        findings.leave_out("annotations without a mask", _label(row), advice)
        return None
    is_rle = isinstance(shape, dict)
    rle = shape if is_rle else mask_utils.merge(mask_utils.frPyObjects(shape, *size))
    area = float(mask_utils.area(rle))
    if not area:
        advice = (
            "They are left out. Coordinates from 0 to 1 have to be multiplied by the image's width "
            "and height; others are those of another image, or of one of another size."
        )
        findings.leave_out("masks without a pixel in their image", _label(row), advice)
        return None
    if crowd:
        advice = "Nothing is learned from them. Set iscrowd to 0 where each is one object."
        findings.leave_out(CROWDS, _label(row), advice)
    findings.instances += not crowd
    given = _number(row.get("area")) or 0.0
    box = row["bbox"] if isinstance(row.get("bbox"), list) else []
    sides = [number for number in map(_number, box) if number is not None]
    is_box = len(sides) == len(box) == 4 and min(sides[2:]) > 0
    return {
        "iscrowd": int(crowd or 0),
        "category_id": index,
        "segmentation": shape if is_rle else [part.tolist() for part in shape],
        "area": given if given > 0 else area,
        "bbox": sides if is_box else mask_utils.toBbox(rle).tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
    }


def _shape(row: dict, size: tuple[int, int], findings: Findings) -> list[np.ndarray] | dict:
    """Flat polygons of three points and more, or compressed RLE; empty where there is no mask."""
    segmentation = row.get("segmentation") or []
    if isinstance(segmentation, dict):
        return compressed_rle(segmentation, size) if segmentation.get("counts") else {}
    if not isinstance(segmentation, list):
        raise DatasetError("expected polygons or an RLE")
    parts = as_polygons(segmentation)
    polygons = read_polygons(parts, size)
    for _ in parts[len(polygons) :] if polygons else ():
        text = "polygons of less than three points"
        findings.leave_out(text, _label(row), "They are left out: complete them.")
    return polygons
