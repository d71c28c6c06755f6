"""Files of a folder by the name of their image, and lists of such names."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from s4m_d2.errors import DatasetError

LABEL_SUFFIXES = (".png", ".npy")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def label_files(folder: str | os.PathLike[str], suffix: str = "") -> dict[str, Path]:
    """The label maps of a folder by the name of their image, sorted; not those of folders below.

    Args:
        suffix: what a stem has beyond the image's name; other files are left out.

    Raises:
        DatasetError: the folder is missing, has none, or two of one name.
    """
    return _files(Path(folder), LABEL_SUFFIXES, "label maps", suffix)


def image_files(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """The images of a folder by stem; otherwise as :func:`label_files`."""
    return _files(Path(folder), IMAGE_SUFFIXES, "images")


def content_of(folder: Path) -> str:
    """What a folder holds, for messages: "12 .npy files, 2 folders (such as 'a.npy')"."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kinds = Counter("folder" if path.is_dir() else f"{path.suffix} file" for path in paths)
    counts = [f"{count} {kind.strip()}{'s' * (count > 1)}" for kind, count in kinds.most_common()]
    return f"{', '.join(counts)} (such as '{paths[0].name}')" if paths else "nothing"


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


def check_folder(folder: Path, kind: str) -> Path:
    """A folder of files of some kind, as it was given.

    Raises:
        DatasetError: it cannot be listed.
    """
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise DatasetError(
            f"'{folder}' cannot be listed: {error.strerror}. Give the folder that holds the {kind}."
        ) from error
    return folder


def _files(
    folder: Path, extensions: tuple[str, ...], kind: str, suffix: str = ""
) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(check_folder(folder, kind).iterdir()):
        if path.suffix.lower() not in extensions or path.name.startswith(".") or path.is_dir():
            continue
        name = path.stem.removesuffix(suffix)
        if suffix and name in ("", path.stem):
            continue
        if name in files:
            raise DatasetError(
                f"'{folder}' has both {files[name].name} and {path.name}: which of them belongs "
                f"to {name}? Take one away."
            )
        files[name] = path
    if not files:
        ending = f" whose names end in {suffix}" if suffix else ""
        raise DatasetError(
            f"'{folder}' has no {kind}{ending} ({', '.join(extensions)}), but "
            f"{content_of(folder)}. Give the folder that holds them itself: folders below are not "
            "searched."
        )
    return files
