"""Several COCO files as one: classes by their names, images that several have from the last."""

import os
import re
from collections.abc import Sequence

from s4m_d2.data.annotations import Annotations, Findings
from s4m_d2.data.images import copies
from s4m_d2.errors import DatasetError, first_names


def merge_annotations(parts: Sequence[Annotations]) -> tuple[Annotations, list[str]]:
    """One set of what several files annotate; a single file's stays as it is.

    A class that the first file lacks comes after its classes. An image that a later file has too,
    as the same file or as a copy, is the later one's.

    Returns:
        the set, its images numbered from 1 and named from the folder that all their folders share;
        what the user should know.

    Raises:
        DatasetError: names of classes in different files differ in spelling alone.
    """
    names, notes = _class_names(parts)
    if len(parts) == 1:
        return parts[0], notes
    records: list[dict] = []  # from the last one to the first
    later: dict[str, str] = {}  # path of an image: its name in the file
    again, alike = [], []
    for part in reversed(parts):
        own = {record["file_name"]: part.name(record) for record in part.records}
        known, taken = copies(own, later), {*later.values()}
        again += [f"{name} of {part.json_file}" for path, name in own.items() if path in known]
        alike += [n for path, n in own.items() if n in taken and path not in known]
        later |= own
        indices = [names.index(name) for name in part.classes]
        for record in reversed(part.records):
            if record["file_name"] not in known:
                rows = record["annotations"]
                rows = [{**row, "category_id": indices[row["category_id"]]} for row in rows]
                records.append({**record, "annotations": rows})
    for text, found in {
        "are in a later file too, and its annotations are taken": again,
        "have a file name of another file's image, but are other pictures: both are trained on (if "
        "they are the same, name the same folder for both with --images)": alike,
    }.items():
        if found:
            notes.append(f"{len(found):,} labeled images {text}: {first_names(found, most=1)}.")
    merged = Annotations(
        ", ".join(part.json_file for part in parts),
        os.path.commonpath([part.image_root for part in parts]),
        tuple(enumerate(names, start=1)),
        tuple({**r, "image_id": n} for n, r in enumerate(reversed(records), start=1)),
        _joined_findings(parts),
    )
    return merged, notes


def _joined_findings(parts: Sequence[Annotations]) -> Findings:
    joined = Findings()
    for part in parts:
        joined.instances += part.findings.instances
        joined.notes += [f"{part.json_file}: {note}" for note in part.findings.notes]
        joined.doubts += part.findings.doubts
        for kind, cases in part.findings.left_out.items():
            joined.left_out[kind] += [f"{case} of {part.json_file}" for case in cases]
    return joined


def _class_names(parts: Sequence[Annotations]) -> tuple[list[str], list[str]]:
    """Names of all files, and notes on two spellings of a name in one file; those of different
    files are refused."""
    spellings: dict[str, tuple[str, Annotations]] = {}
    notes: list[str] = []
    for part in parts:
        for name in part.classes:
            key = re.sub(r"[\s_-]+", "", name.casefold()) or name
            other, first = spellings.setdefault(key, (name, part))
            if other == name:
                continue
            if other not in part.classes and name not in first.classes:
                raise DatasetError(
                    f"The class '{other}' of {first.json_file} is written '{name}' in "
                    f"{part.json_file}. Write one name in both; list two classes both in one file."
                )
            notes.append(
                f"'{other}' and '{name}' of {part.json_file} are two classes. If they are one, "
                "give its annotations one category_id, and remove the other category."
            )
    return list(dict.fromkeys(name for part in parts for name in part.classes)), notes
