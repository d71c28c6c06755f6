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
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from pycocotools import mask as mask_utils

from s4m_d2.data.images import find_below, folded, image_size
from s4m_d2.data.segmentations import read_segmentation
from s4m_d2.errors import DatasetError, first_names

_GIVE = "Give a COCO json of instances (from VIA or LabelMe: tools/convert_annotations.py)."
_LARGE = 1 << 24  # px: the size of larger images is verified in their files
_CROWDS = "crowds (iscrowd 1)", "Set iscrowd 0 where each is one object."

Choose = Callable[[Sequence[str]], Collection[str]]
Key = int | str | None
Kind = tuple[str, str]  # text, which a message puts after the number of cases; remedy
Size = tuple[int, int]


@dataclass
class Findings:
    """What was corrected, left out or refused while a file was read."""

    instances: int = 0  #: that are usable
    rectangles: int = 0  #: of these, masks that fill their boxes
    notes: list[str] = field(default_factory=list)  #: corrections
    doubts: list[str] = field(default_factory=list)  #: messages: corrections that may be wrong
    #: names of annotations that are no targets
    left_out: dict[Kind, list[str]] = field(default_factory=lambda: defaultdict(list))
    #: names of what makes the file unusable
    refused: dict[Kind, list[str]] = field(default_factory=lambda: defaultdict(list))

    def leave_out(self, row: dict, text: str, remedy: str, times: int = 1) -> None:
        """Count an annotation that is no target."""
        self.left_out[text, remedy] += [_label(row)] * times

    @property
    def summary(self) -> str:
        """Counts of annotations left out, and notes; "" if there are none."""
        counts = [f"{len(names):,} {text}" for (text, _), names in self.left_out.items()]
        return "; ".join([f"no targets: {', '.join(counts)}"] * bool(counts) + self.notes)

    @property
    def warnings(self) -> list[str]:
        """A message for each kind that was left out; for crowds only if they are over a tenth."""
        crowds = len(self.left_out.get(_CROWDS, ()))
        are_many = crowds > 0.1 * (crowds + self.instances)
        shown = {k: v for k, v in self.left_out.items() if are_many or k != _CROWDS}
        return self.doubts + _messages(shown, " are no targets")

    def problems(self) -> list[str]:
        """A message for each problem that makes the file unusable."""
        if not self.refused and self.left_out and not self.instances:
            return [f"no instance can be used. {' '.join(_messages(self.left_out))}"]
        return _messages(self.refused)


def _messages(kinds: Mapping[Kind, Sequence[str]], verb: str = "") -> list[str]:
    return [
        f"{len(names):,} {text}{verb}: {first_names(names, most=3)}. {remedy}".strip()
        for (text, remedy), names in kinds.items()
    ]


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
        classes = {"thing_classes": self.classes, "thing_dataset_id_to_contiguous_id": ids}
        return {**classes, "findings": self.findings}

    def name(self, record: dict) -> str:
        """A record's path below the folder of images."""
        return record["file_name"].removeprefix(os.path.join(self.image_root, ""))

    def part(self, names: Collection[str]) -> Annotations:
        """Keep only the images with these names."""
        return replace(self, records=tuple(r for r in self.records if self.name(r) in names))

    def indices(self) -> set[int]:
        """Class indices of all instances."""
        return {a["category_id"] for record in self.records for a in targets(record)}

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


def targets(record: dict) -> list[dict]:
    """A Detectron2 record's annotations without crowds."""
    return [a for a in record["annotations"] if not a.get("iscrowd", 0)]


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
        classes: expected names of the categories, in the order of class indices; (): the file's
            own, in the order of their ids.
        choose: paths of all images -> paths of the wanted ones, whose annotations alone are read;
            None: all.
        remedy: end of the message about a missing file or image.
        strict: False: return the usable part of a file with problems, which are in the findings.

    Raises:
        DatasetError: names all problems of the file and its chosen images, one a line.
    """
    collects = gc.isenabled()
    gc.disable()  # it would traverse millions of new objects repeatedly
    try:
        state = os.stat(json_file)
        stamp = state.st_mtime_ns, state.st_size
        annotations = _read(json_file, stamp, image_root, tuple(classes), choose, remedy)
    except OSError as error:
        raise DatasetError(f"{json_file}: {error.strerror}. {remedy}".strip()) from error
    finally:
        if collects:
            gc.enable()
    if strict and (problems := annotations.findings.problems()):
        raise DatasetError(*(f"{json_file}: {problem}" for problem in problems))
    return annotations


@functools.lru_cache(4)
def _read(
    json_file: str,
    stamp: Hashable,  # of the file's content
    image_root: str,
    classes: tuple[str, ...],
    choose: Choose | None,
    remedy: str,
) -> Annotations:
    content, findings = _load(json_file), Findings()
    images = _images(content["images"], findings)
    categories, indices = _categories(content, classes, json_file, findings)
    by_image: dict[Key, list[dict]] = defaultdict(list)
    for row in content["annotations"]:
        key = _key(row.get("image_id"))
        by_image[key].append(row)
        if key not in images:
            text = "annotations of images that are not listed"
            findings.leave_out(row, text, "List these images.")
    paths = [os.path.join(image_root, image["file_name"]) for image in images.values()]
    chosen = set(choose(paths) if choose else paths)
    places = _places(images, chosen, image_root, remedy, findings)
    is_numbered = all(isinstance(key, int) for key in images)
    records: list[dict[str, Any]] = []
    for position, key in enumerate(images, start=1):
        if key in places:
            (path, size), seen = places[key], set[tuple]()
            found = [_annotation(row, size, indices, seen, findings) for row in by_image[key]]
            image_id = key if is_numbered else position
            record = {"file_name": path, "image_id": image_id, "height": size[0], "width": size[1]}
            records.append({**record, "annotations": list(filter(None, found))})
    if findings.rectangles == findings.instances >= 30:
        findings.doubts.append(
            f"All {findings.instances:,} masks are upright rectangles. If these are boxes around "
            "the objects, draw the outlines: a model learns what it is shown."
        )
    if is_numbered:
        records.sort(key=lambda record: record["image_id"])  # Detectron2's order
    gc.freeze()  # excludes the records from collections: they live as long as the process
    return Annotations(json_file, image_root, categories, tuple(records), findings)


def _load(json_file: str) -> dict[str, list[dict]]:
    try:
        content = json.loads(Path(json_file).read_bytes())  # UTF-8, 16 or 32, with BOM or without
    except UnicodeDecodeError as error:
        remedy = "Save it as UTF-8, or unpack it."
        raise DatasetError(f"{json_file} is no UTF-8 text. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{json_file} is no valid JSON: {error}. {_GIVE}") from error
    for section in ("images", "annotations", "categories"):
        rows = content.get(section) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DatasetError(f"{json_file} has no list '{section}' of objects. {_GIVE}")
        content[section] = [row for row in rows if row.get("deleted") is not True]
    rows = content["annotations"]
    for key, kind in (("segments_info", "panoptic segments"), ("keypoints", "keypoints")):
        if rows and all(key in row and "segmentation" not in row for row in rows):
            raise DatasetError(f"{json_file} is a COCO file of {kind}; give one of instances.")
    return content


def _is_name(value: Any) -> bool:
    """Whether it is a text without lone surrogates, which cannot be encoded."""
    return isinstance(value, str) and re.fullmatch("[^\0\ud800-\udfff]+", value) is not None


def _key(value: Any) -> Key:
    """Normalize an id (1, 1.0 and "1" are equal); None: not an id."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() and value.isascii() and len(value) < 19 else value
    is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole else None


def _label(row: dict) -> str:
    """Name of an annotation in messages."""
    return f"id {row['id']}" if "id" in row else f"without id, of image {row.get('image_id')}"


def _number(value: Any) -> float:
    """Parse a finite number, which may be text; nan: it is none."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _images(rows: Sequence[dict], findings: Findings) -> dict[Key, dict]:
    """The file's images by id."""
    images, by_name = dict[Key, dict](), dict[str, dict]()
    for row in rows:
        name: Any = row.get("file_name") or row.get("coco_url")  # LVIS
        key = _key(row.get("id"))
        shown = f"{name} (id {row.get('id')})"
        if key is None or not _is_name(name):
            kind = "images have no usable file_name and id", "Complete them."
            findings.refused[kind].append(shown)
        elif key in images and images[key] is by_name.get(name):
            continue  # the same once more
        elif other := images.get(key) or by_name.get(name):
            text = "images have an id or file_name of another one"
            kind = text, "Remove one of each, or number the images anew."
            findings.refused[kind].append(f"{other['file_name']} (id {other['id']}) and {shown}")
        else:
            images[key] = by_name[name] = {**row, "file_name": name}
    return images


def _categories(
    content: dict[str, list[dict]], classes: Sequence[str], json_file: str, findings: Findings
) -> tuple[tuple[tuple[int, str], ...], dict[Key, int]]:
    """(id, name) of each class in the order of class indices, and from ids to class indices."""
    named = _names_by_id(content, classes, findings)
    if not named:
        raise DatasetError(f"{json_file}: 'categories' is empty. List the classes there.")
    order = sorted(named, key=lambda key: (isinstance(key, str), key))
    names = list(classes) or [named[key] for key in order]
    if strange := sorted({*named.values()} - {*names}):
        raise DatasetError(
            f"{json_file} has annotations of the categories {', '.join(strange)}; expected "
            f"{', '.join(names)}. Write the same names in both files (their ids may differ)."
        )
    if lacking := [name for name in names if name not in named.values()]:
        findings.notes.append(f"no category {', '.join(lacking)}: its AP is nan")
    indices = {key: names.index(name) for key, name in named.items()}
    ids = {index: key for key, index in indices.items() if isinstance(key, int)}
    if len(ids) < len(indices):
        return tuple(enumerate(names, start=1)), indices
    fresh = max(ids.values(), default=0) + 1
    return tuple((ids.get(i, fresh + i), name) for i, name in enumerate(names)), indices


def _names_by_id(
    content: dict[str, list[dict]], classes: Sequence[str], findings: Findings
) -> dict[Key, str]:
    """Names of the categories, without superfluous ones that no annotation has."""
    named: dict[Key, str] = {}
    for row in content["categories"]:
        key, name = _key(row.get("id")), row.get("name")
        name = str(name).strip() if isinstance(name, int | str) else name
        if key is None or named.get(key, name) != name or not _is_name(name):
            kind = "categories lack a name or an id of their own", "Complete or number them anew."
            findings.refused[kind].append(f"{name!r} (id {row.get('id')})")
        else:
            named[key] = str(name)
    rows = content["categories"]
    parents = [p for row in rows if (p := row.get("supercategory")) != row.get("name")]
    used = {_key(row.get("category_id")) for row in content["annotations"]}
    count = Counter(named.values())
    for key, name in [*named.items()]:
        is_no_class = name in parents or name.strip("_").lower() == "background"  # LabelMe's script
        is_foreign = classes and name not in classes
        is_superfluous = count[name] > 1 or (used and is_no_class) or is_foreign
        if key not in used and is_superfluous:
            findings.notes.append(f"unused category {name} (id {key}) dropped")
            count[name] -= 1
            del named[key]
    if twice := [name for name in count if count[name] > 1]:
        kind = "names are of two categories", "Give each class one id and name."
        findings.refused[kind] += twice
    return named


def _places(
    images: dict[Key, dict], chosen: set[str], image_root: str, remedy: str, findings: Findings
) -> dict[Key, tuple[str, Size]]:
    """Path and (H, W) of the chosen images that are there, by their ids."""
    places, missing, moved, unsure = {}, [], [], 0
    owners: dict[str, str] = {}  # file_name by path below the folder
    for key, image in images.items():
        if os.path.join(image_root, given := image["file_name"]) not in chosen:
            continue
        if not (name := find_below(image_root, given)):
            missing.append(given.replace("\\", "/"))
            continue
        if folded(name) != folded(os.path.normpath(given.replace("\\", "/"))):
            moved.append(f"{name} of {given}")
            unsure += given[0] not in "/." and ":" not in given  # no path of a tool's machine
        path = os.path.join(image_root, name)
        if owners.setdefault(name, given) != given:
            start = f"Give the folder that they start from, which is not {image_root}."
            kind = "file names lead to an image of another one", start
            findings.refused[kind].append(f"{owners[name]} and {given}")
        elif size := _size(image, path, name, findings):
            places[key] = path, size
    if moved:
        findings.notes.append(f"{len(moved):,} found by the end of file_name: {moved[0]}")
    if unsure:
        findings.doubts.append(
            f"{unsure:,} images of {image_root} were found by the end of their file_name alone. If "
            "these are other pictures, give the folder that file_name starts from."
        )
    if missing:
        base = os.path.basename(missing[0])
        found = (below for below, *_ in os.walk(image_root) if os.path.isfile(f"{below}/{base}"))
        if below := next(found, None):
            remedy = f"{base} lies in {below}: the folder and file_name must lead there. {remedy}"
        if not os.path.isdir(image_root):
            remedy = f"That is no folder. {remedy}"
        findings.refused[f"images are not in {image_root}", remedy] += missing
    return places


def _size(image: dict, path: str, name: str, findings: Findings) -> Size | None:
    """(H, W) that the json says, or the file where it says none; None: the file is damaged."""
    height, width = (_number(image.get(side)) for side in ("height", "width"))
    is_whole = min(height, width) >= 1 and (height % 1, width % 1) == (0, 0)
    size = (int(height), int(width)) if is_whole else None
    if size and height * width <= _LARGE:
        return size
    try:
        actual = image_size(path)
    except DatasetError as error:
        findings.refused["images cannot be read", ""].append(str(error))
        return None
    if size not in (None, actual):
        kind = "images have another (height, width)", "Correct it."
        findings.refused[kind].append(f"{name}, {size} instead of {actual}")
    return actual


def _annotation(
    row: dict, size: Size, indices: dict[Key, int], seen: set[tuple], findings: Findings
) -> dict | None:
    """An annotation of an image of (H, W), normalized; None, and counted, if it cannot be used."""
    crowd, index = _number(row.get("iscrowd") or 0), indices.get(_key(row.get("category_id")))
    try:
        if crowd not in (0, 1):
            raise DatasetError("iscrowd is not 0 or 1")
        if index is None:
            raise DatasetError(f"'categories' does not list {row.get('category_id')!r}")
        shape, incomplete = read_segmentation(row.get("segmentation"), size)
    except DatasetError as error:
        kind = "annotations cannot be used", "Correct or remove them."
        findings.refused[kind].append(f"{_label(row)} ({error})")
        return None
    if not shape:
        findings.leave_out(row, "annotations without a mask", "Draw masks, or remove them.")
        return None
    if incomplete:
        findings.leave_out(row, "polygons of less than three points", "Complete them.", incomplete)
    is_rle = isinstance(shape, dict)
    rle: Any = shape if is_rle else mask_utils.merge(mask_utils.frPyObjects(shape, *size))
    area = float(mask_utils.area(rle))
    content = index, crowd, rle["counts"]
    if not area or (not is_rle and max(part.max() for part in shape) <= 1):
        remedy = "Coordinates may be from 0 to 1 instead of px, or of another image or size."
        findings.leave_out(row, "masks without a pixel in their image", remedy)
        return None
    if content in seen:  # of this image
        findings.leave_out(row, "copies of annotations", "Remove them.")
        return None
    seen.add(content)
    if crowd:
        findings.leave_out(row, *_CROWDS)
    box = mask_utils.toBbox(rle).tolist()
    findings.instances += not crowd
    findings.rectangles += not crowd and area == box[2] * box[3]
    given_area = _number(row.get("area"))
    return {
        "iscrowd": int(crowd),
        "category_id": index,
        "segmentation": shape if is_rle else [part.tolist() for part in shape],
        "area": given_area if given_area >= 1 else area,  # COCO's, for AP by size; not of 0 to 1
        "bbox": box,
        "bbox_mode": BoxMode.XYWH_ABS,
    }
