"""The one reader of COCO files of instances: what training, evaluation and drawing see is the same.

A file is parsed once per process. What an annotation tool's export clearly means is read; what has
no meaning is left out with a count, or refused, everything in one report.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s4m_d2.data.annotation_rows import (
    NO_IMAGE,
    Findings,
    Key,
    key_of,
    name_of,
    normalized_annotations,
    side_of,
)
from s4m_d2.data.images import image_size
from s4m_d2.errors import DatasetError

_KEPT_FILES = 4  # results of reading that stay in memory
_LARGE = 1 << 24  # px: an image is looked at before masks of such a size are made
_ENCODINGS = ("gb18030", "shift_jis", "cp1252")  # that a file which is no UTF-8 may have

Choose = Callable[[Sequence[str]], Collection[str]]


@dataclass(frozen=True)
class Annotations:
    """Normalized content of a COCO file, or a part of its images.

    Attributes:
        json_file, image_root: where it was read, and the folder that its file names start from.
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
        """What Detectron2's evaluators need to know of the classes, and the findings."""
        ids = {number: index for index, (number, _) in enumerate(self.categories)}
        return {
            "thing_classes": self.classes,
            "thing_dataset_id_to_contiguous_id": ids,
            "findings": self.findings,
        }

    def name(self, record: dict) -> str:
        """A record's path below the folder of images."""
        return _below(record["file_name"], self.image_root)

    def part(self, names: Collection[str]) -> Annotations:
        """The images of these names alone."""
        records = tuple(record for record in self.records if self.name(record) in names)
        return Annotations(self.json_file, self.image_root, self.categories, records, self.findings)

    def instances(self) -> Iterable[tuple[dict, dict]]:
        """Each (record, annotation) that is a target: crowds are left out."""
        for record in self.records:
            for annotation in record["annotations"]:
                if not annotation["iscrowd"]:
                    yield record, annotation

    def to_coco(self) -> dict:
        """A COCO file's content, complete for COCO's evaluation; annotations count from 1 (to its
        API an id of 0 is no match)."""
        images = [
            {
                "id": record["image_id"],
                "file_name": self.name(record),
                "height": record["height"],
                "width": record["width"],
            }
            for record in self.records
        ]
        annotations = [
            {**row, "image_id": record["image_id"], "category_id": self.categories[index][0]}
            for record in self.records
            for row in record["annotations"]
            for index in [row["category_id"]]
        ]
        for number, row in enumerate(annotations, start=1):
            row["id"] = number
            del row["bbox_mode"]
        categories = [{"id": number, "name": name} for number, name in self.categories]
        return {"images": images, "annotations": annotations, "categories": categories}


@functools.cache
def _below(path: str, folder: str) -> str:
    return os.path.relpath(path, folder)


def read_annotations(
    json_file: str,
    image_root: str,
    *,
    classes: Sequence[str] = (),
    choose: Choose | None = None,
    remedy: str = "",
    strict: bool = True,
) -> Annotations:
    """Read a COCO file of instances; a file that did not change is parsed once per process.

    Args:
        json_file, image_root: paths.
        classes: names that the file's categories are matched with, in the order of class indices;
            (): the file's own, in the order of their ids.
        choose: from the file names of all images to those wanted; only their annotations are
            looked at. None: all.
        remedy: ends the message about a file or image that is missing.
        strict: False: what can be used of a file with problems, which are in the findings.

    Raises:
        DatasetError: the file is missing, malformed, of another kind, has other classes, or none of
            its instances can be used; a chosen image is missing. All problems in one message.
    """
    try:
        state = os.stat(json_file)
    except OSError as error:
        raise DatasetError(f"{json_file}: {error.strerror}. {remedy}".strip()) from error
    stamp = (state.st_mtime_ns, state.st_size)
    collects = gc.isenabled()
    gc.disable()  # it would walk millions of new objects again and again
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
        key = key_of(row.get("image_id"))
        if key in chosen:
            by_image[key].append(row)
        elif key not in images:
            findings.left_out[NO_IMAGE].append(name_of(row))
    if len({repr(row.get("id")) for row in rows}) < len(rows):
        findings.notes.append("ids of annotations are missing or repeat: counted anew")
    numbered = all(isinstance(key, int) for key in images)
    records = []
    for position, (key, image) in enumerate(images.items(), start=1):
        if key not in chosen:
            continue
        size = image["height"], image["width"]
        record = {
            "file_name": image["file_name"],
            "image_id": key if numbered else position,
            "height": size[0],
            "width": size[1],
            "annotations": normalized_annotations(by_image[key], size, indices, findings),
        }
        records.append(record)
    if strict:
        findings.raise_for(json_file)
    if numbered:
        records.sort(key=lambda record: record["image_id"])  # Detectron2's order
    gc.freeze()  # collections need not walk it: it stays as long as the process
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
        if isinstance(content.get(section), list):
            continue
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
    rows = content[section]
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            findings.refuse(
                f"entries of '{section}' are no objects", f"#{position}", "Remove them."
            )
    return [row for row in rows if isinstance(row, dict)]


def _is_name(value: Any) -> bool:
    """A text that can be written: no lone surrogate, which no encoding has."""
    if not isinstance(value, str) or not value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _images(rows: Sequence[dict], findings: Findings) -> dict[Key, dict]:
    """The file's images by their ids; each id and each file once."""
    images: dict[Key, dict] = {}
    first: dict[str, Any] = {}
    for row in rows:
        name, key = row.get("file_name"), key_of(row.get("id"))
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
            images[key], first[str(name)] = dict(row), row["id"]
    return images


def _categories(
    content: dict, rows: Sequence[dict], classes: Sequence[str], json_file: str, findings: Findings
) -> tuple[tuple[tuple[int, str], ...], dict[Key, int]]:
    """(id, name) of each class in the order of class indices, and from ids to class indices."""
    named: dict[Key, str] = {}
    parents = set()
    for position, row in enumerate(_objects(content, "categories", findings)):
        key, name = key_of(row.get("id")), row.get("name")
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
    used = {key_of(row.get("category_id")) for row in rows}
    unused = {key: name for key, name in named.items() if key not in used}
    again = Counter(named.values())
    for key, name in unused.items():
        if again[name] > 1 or (name in parents and used) or (classes and name not in classes):
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


def _chosen(
    images: dict[Key, dict],
    choose: Choose | None,
    image_root: str,
    findings: Findings,
    remedy: str,
) -> set[Key]:
    """Ids of the chosen images that are there; their entries get the path and size of a file."""
    by_name = {image["file_name"]: key for key, image in images.items()}
    chosen = [by_name[name] for name in (choose(list(by_name)) if choose else by_name)]
    root, unsized, missing, sized = os.path.abspath(image_root), 0, [], set()
    for key in chosen:
        image = images[key]
        name = image["file_name"]
        path = os.path.join(image_root, name)
        if "\\" in name and not os.path.exists(path):
            path = os.path.join(image_root, name.replace("\\", "/"))
        image["file_name"] = path
        height, width = side_of(image.get("height")), side_of(image.get("width"))
        if os.path.commonpath((root, os.path.abspath(path))) != root:
            advice = f"Write them relative to the folder of images, {image_root}."
            findings.refuse("file names lead out of the folder of images", name, advice)
        elif not os.path.isfile(path):
            missing.append(path)
        elif height is None or width is None or height * width > _LARGE:
            unsized += height is None or width is None
            try:
                image["height"], image["width"] = size = image_size(path)
            except DatasetError as error:
                findings.refuse("images cannot be read", error, "")
                continue
            if height and width and (height, width) != size:
                where = f"{name}, {(height, width)} instead of {size}"
                advice = "Correct the (height, width)."
                findings.refuse("images have another size in their file", where, advice)
                continue
            sized.add(key)
        else:
            image["height"], image["width"] = height, width
            sized.add(key)
    if unsized:
        findings.notes.append(f"sizes of {unsized:,} images taken from their files")
    if missing:
        _refuse_missing(missing, len(chosen), image_root, findings, remedy)
    return sized


def _refuse_missing(
    missing: Sequence[str], count: int, image_root: str, findings: Findings, remedy: str
) -> None:
    base = os.path.basename(missing[0])
    tree = os.walk(image_root)
    below = next((os.path.join(folder, base) for folder, _, n in tree if base in n), None)
    advice = f"{base} lies at {below}: write the sub-folders too. " * bool(below) + remedy
    for path in missing:
        text = f"of {count:,} images are not in {image_root}"
        findings.refuse(text, os.path.relpath(path, image_root), advice)
