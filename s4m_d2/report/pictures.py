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
_NUMBERED = re.compile(r"(.+?)_(\d{7,})\.png")
_CANNOT_READ = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


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
    pictures, size = [], 0
    for title, path in found[:MOST_PICTURES]:
        try:
            content, shape = _jpeg(path)
        except _CANNOT_READ as error:
            logger.warning("The picture '%s' is left out of the report: %s", path, error)
            continue
        size += len(content)
        if size > MOST_BYTES:
            logger.warning("The report has room for %d pictures only.", len(pictures))
            break
        text = base64.b64encode(content).decode("ascii")
        pictures.append(Picture(title, f"data:image/jpeg;base64,{text}", shape))
    return pictures


def _latest(folder: str) -> list[tuple[str, str]]:
    """(title, path) of the latest figure of each kind."""
    latest: dict[str, tuple[int, str]] = {}
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            latest[match[1]] = max(latest.get(match[1], (0, "")), (int(match[2]), name))
    return [
        (f"{kind.replace('_', ' ')} after {iteration:,} iterations", os.path.join(folder, name))
        for kind, (iteration, name) in latest.items()
    ]


def _jpeg(path: str) -> tuple[bytes, tuple[int, int]]:
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return content.getvalue(), picture.size
