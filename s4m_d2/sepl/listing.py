"""Files of a folder by the name of their image, and lists of such names."""

from __future__ import annotations

import os
from pathlib import Path

from s4m_d2.errors import DatasetError

LABEL_SUFFIXES = (".png",)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def label_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The PNG files of a folder by stem, sorted; not those of folders below.

    Raises:
        DatasetError: the folder is missing, has none, or two of one stem.
    """
    return _files(Path(folder), LABEL_SUFFIXES, "label maps")


def image_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The images of a folder by stem; otherwise as :func:`label_files`."""
    return _files(Path(folder), IMAGE_SUFFIXES, "images")


def image_list(path: str | os.PathLike[str]) -> list[str]:
    """Names of images in a text file such as VOC's train.txt, each once, in the file's order.

    What counts is a line's first word, of a path its last part without an image's suffix: so lists
    of pairs "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png" are read too.

    Raises:
        DatasetError: the file is missing, no text, or names nothing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} cannot be read: {error}. Give a text file with the name of an image a line."
        ) from error
    words = [line.split()[0] for line in lines if line.strip()]
    names = list(dict.fromkeys(name for name in map(_stem, words) if name))
    if not names:
        raise DatasetError(f"{path} names no image. Write the name of an image on each line.")
    return names


def _stem(word: str) -> str:
    name = word.replace("\\", "/").rsplit("/", 1)[-1]
    root, suffix = os.path.splitext(name)
    return root if suffix.lower() in IMAGE_SUFFIXES else name


def _files(folder: Path, suffixes: tuple[str, ...], kind: str) -> dict[str, Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetError(
            f"'{folder}' cannot be listed: {error.strerror}. Give the folder that holds the {kind}."
        ) from error
    files: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in suffixes or path.name.startswith(".") or path.is_dir():
            continue
        if path.stem in files:
            raise DatasetError(
                f"'{folder}' has both {files[path.stem].name} and {path.name}: which of them "
                f"belongs to {path.stem}? Take one away."
            )
        files[path.stem] = path
    if not files:
        raise DatasetError(
            f"'{folder}' has no {kind} ({', '.join(suffixes)}). Give the folder that holds them "
            "itself: folders below are not searched."
        )
    return files
