"""Reading the files of annotation tools, one module per format, and writing COCO's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotation_formats import labelme, via
from annotation_formats.shapes import LabeledImage
from s4m_d2.errors import DatasetError


def read_annotations(
    path: Path, class_attribute: str = "", class_name: str = ""
) -> Iterator[LabeledImage]:
    """The images of a JSON file of VIA 2 or LabelMe, whose format shows in its content."""
    content = read_json(path)
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


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8, or another UTF that shows in its first bytes."""
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DatasetError(f"its text is not in UTF-8 ({error}): save it in UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"this is no valid JSON ({error}): export JSON, not CSV") from error
