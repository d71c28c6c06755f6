"""The pictures of a run's folder, small enough for a page."""

from __future__ import annotations

import base64
import io
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

logger = logging.getLogger(__name__)

MOST_PICTURES = 14
MOST_BYTES = 6 << 20  # of all pictures of a page, as files
MOST_SIDE = 1600  # px; a larger picture is made smaller
JPEG_QUALITY = 85
# Kinds of figures for people, in the order of a gallery.
TITLES = {
    "predictions": "predictions",
    "pseudo_labels": "pseudo-labels",
    "arp": "ARP",
    "similarity": "similarity to a point",
    "views": "views of unlabeled images",
    "labeled": "labeled images and augmentation",
}
_NUMBERED = re.compile(r"(.+?)_(\d{7,})\.png")


@dataclass(frozen=True)
class Picture:
    """A picture of a gallery; ``uri`` holds all of it."""

    title: str
    uri: str
    size: tuple[int, int]  # (width, height) px


def pictures_of(
    folders: Iterable[tuple[str, str]], files: Iterable[tuple[str, str]] = ()
) -> list[Picture]:
    """The latest of each kind of a run's figures. What cannot be read is left out.

    Args:
        folders: (title, folder of NAME_ITERATION.png) of each stage.
        files: (title, path) of other pictures, first.
    """
    found = [(title, path) for title, path in files if os.path.isfile(path)]
    for stage, folder in folders:
        found += [(f"{stage} · {title}", path) for title, path in _latest(folder)]
    pictures: dict[str, Picture] = {}  # by content: stages share what does not depend on models
    size = 0
    for title, path in found:
        try:
            content, shape = _jpeg(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            logger.warning("The picture '%s' is left out of the report: %s", path, error)
            continue
        uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode('ascii')}"
        if uri in pictures:
            continue
        size += len(content)
        if size > MOST_BYTES or len(pictures) == MOST_PICTURES:
            logger.warning("The report has room for %d pictures only.", len(pictures))
            break
        pictures[uri] = Picture(title, uri, shape)
    return list(pictures.values())


def _latest(folder: str) -> list[tuple[str, str]]:
    """(title, path) of the latest figure of each kind, in the gallery's order."""
    latest: dict[str, tuple[int, str]] = {}
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for match in filter(None, map(_NUMBERED.fullmatch, sorted(names))):
        latest[match[1]] = max(latest.get(match[1], (0, "")), (int(match[2]), match[0]))
    order = list(TITLES)
    kinds = sorted(latest, key=lambda kind: order.index(kind) if kind in order else len(order))
    return [
        (
            f"{TITLES.get(kind, kind.replace('_', ' '))} after {latest[kind][0]:,} iterations",
            os.path.join(folder, latest[kind][1]),
        )
        for kind in kinds
    ]


def _jpeg(path: str) -> tuple[bytes, tuple[int, int]]:
    with Image.open(path, formats=("PNG",)) as file:  # others may start programs
        picture = file.convert("RGB")
    picture.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue(), picture.size
