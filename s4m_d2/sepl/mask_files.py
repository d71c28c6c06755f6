"""SAM's masks of images in files: those of other programs, and SEPL's own cache.

Of the image NAME a folder of masks has one of

- ``NAME/``: a PNG a mask, non-zero where it is set, as segment-anything's ``amg.py`` and SEPL's
  authors write them. Their order is that of the names, numbers in them by value. A folder that is
  empty, or has ``metadata.csv`` alone, is that of an image in which SAM found nothing.
- ``NAME.json``, ``NAME.json.gz``: COCO RLEs, compressed or not, in a list, each for itself or as
  the ``segmentation`` of a record (``amg.py --convert-to-rle``); or such a list under
  ``annotations`` (SA-1B) or under ``masks`` (:func:`write_masks`).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from s4m_d2.data.images import READ_ERRORS, unreadable
from s4m_d2.data.segmentations import compressed_rle
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.files import atomic_write

JSON_ENDINGS = (".json", ".json.gz")
_PNG_ENDING = ".png"
_SUMMARY = "metadata.csv"  # which amg.py writes beside the PNGs
_JSON_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error)
_LISTS = ("masks", "annotations")  # keys of the list in a JSON file that is a dict
_SEVERAL_IMAGES = "images"  # a key of COCO's files, whose annotations are those of many images


def find_masks(folder: str | os.PathLike[str], name: str) -> Path | None:
    """Where the masks of the image ``name`` are; None: nowhere.

    Raises:
        DatasetError: in several places.
    """
    base = Path(folder) / name
    found = [base] if base.is_dir() else []
    files = [base.with_name(base.name + ending) for ending in JSON_ENDINGS]
    found += [file for file in files if file.is_file()]
    if len(found) > 1:
        places = " and ".join(str(place) for place in found)
        raise DatasetError(
            f"{places} both hold masks of the image {name!r}. Remove the one that is out of date."
        )
    return found[0] if found else None


def mask_names(folder: str | os.PathLike[str]) -> set[str]:
    """Names of the images that a folder has masks of."""
    names = set()
    for path in Path(folder).iterdir():
        endings = [ending for ending in JSON_ENDINGS if path.name.endswith(ending)]
        if endings or path.is_dir():
            names.add(path.name.removesuffix(endings[0]) if endings else path.name)
    return names


def read_masks(source: str | os.PathLike[str], size: tuple[int, int]) -> list[dict[str, Any]]:
    """All masks of one image.

    Args:
        source: a folder or file of the formats above.
        size: (H, W) of the image.

    Returns:
        Compressed COCO RLEs, checked: dicts with ``size`` [H, W] and ``counts``, a str.

    Raises:
        DatasetError: names the file and the mask that is damaged, of another size or no mask.
    """
    source, size = Path(source), _whole(size)
    if source.is_dir():
        return [_read_png(file, size) for file in _png_files(source)]
    content = _read_json(source)
    return _checked(source, _mask_list(source, content), size)


def write_masks(
    path: str | os.PathLike[str],
    records: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    fingerprint: str,
) -> list[dict[str, Any]]:
    """Keep an image's masks in a file, which :func:`cached_masks` and :func:`read_masks` read.

    Args:
        path: ends with ``.json``, or with ``.json.gz`` to be compressed. Written atomically.
        records: SAM's records or RLEs alone; all that they hold is kept.
        size: (H, W) of the image.
        fingerprint: of what made the masks: AutomaticMasks.fingerprint(). Where images may change
            under their names, add theirs.

    Returns:
        What :func:`read_masks` reads from it.

    Raises:
        InputError: a mask is no RLE of that size, or the ending is another.
        OutputError: the file cannot be written.
    """
    size = _whole(size)
    if not os.fspath(path).endswith(JSON_ENDINGS):
        raise InputError(f"{path} must end with {' or '.join(JSON_ENDINGS)}")
    try:
        rles = _checked(path, records, size)
    except DatasetError as error:
        raise InputError(str(error)) from error
    masks = [
        {**record, "segmentation": rle} if "segmentation" in record else {**record, **rle}
        for record, rle in zip(records, rles, strict=True)
    ]
    content = {"size": list(size), "fingerprint": fingerprint, "masks": masks}
    text = json.dumps(content, separators=(",", ":")).encode()
    if os.fspath(path).endswith(".gz"):
        text = gzip.compress(text, mtime=0)  # equal masks make equal files
    with atomic_write(path, "wb") as file:
        file.write(text)
    return rles


def cached_masks(
    path: str | os.PathLike[str], size: tuple[int, int], fingerprint: str
) -> list[dict[str, Any]] | None:
    """The masks that :func:`write_masks` kept, as :func:`read_masks` returns them.

    None where they are to be made anew: there is no file, or it is damaged, of an image of another
    size, or not of this fingerprint.
    """
    size = _whole(size)
    try:
        content = _read_json(path)
        known = isinstance(content, dict) and (
            content.get("size") == list(size) and content.get("fingerprint") == fingerprint
        )
        return _checked(path, _mask_list(path, content), size) if known else None
    except DatasetError:
        return None


def _whole(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"size is {tuple(size)}; expected (height, width) of an image, from 1 on")
    return int(height), int(width)


def _png_files(folder: Path) -> list[Path]:
    """A folder's masks in their order."""
    try:
        files = [
            file
            for file in folder.iterdir()
            if file.is_file() and not file.name.startswith(".") and file.name != _SUMMARY
        ]
    except OSError as error:
        raise DatasetError(
            f"{folder} cannot be read: {error.strerror}. Correct its permissions."
        ) from error
    masks = [file for file in files if file.suffix.lower() == _PNG_ENDING]
    if files and not masks:
        raise DatasetError(
            f"{folder} has no PNG, but {min(files).name!r}; expected a binary PNG a mask. Convert "
            "the masks, or empty the folder if the image has none."
        )
    return sorted(masks, key=lambda file: (_by_value(file.stem), file.name))


def _by_value(name: str) -> list[str | int]:
    """Text and numbers of a name in turns."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts


def _read_png(file: Path, size: tuple[int, int]) -> dict[str, Any]:
    try:
        with Image.open(file) as image:
            _check_png(file, image, size)
            values = np.asarray(image)
    except DatasetError:
        raise
    except READ_ERRORS as error:
        raise unreadable(str(file), error) from error
    rle = mask_utils.encode(np.asfortranarray(values != 0, dtype=np.uint8))
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


def _check_png(file: Path, image: Image.Image, size: tuple[int, int]) -> None:
    """Refuse a mask by its header, before it is decoded."""
    if len(image.getbands()) != 1:
        raise DatasetError(
            f"{file} has the channels {', '.join(image.getbands())}; expected a mask with a single "
            "one, 0 and 255. Take the picture out of the folder, or save the mask as gray."
        )
    if image.size[::-1] != size:
        raise DatasetError(
            f"{file} has (height, width) {image.size[::-1]}, but the image has {size}. Make the "
            "masks of this image, at its size."
        )


def _read_json(path: str | os.PathLike[str]) -> Any:
    opener = gzip.open if os.fspath(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} does not exist; expected a folder of binary PNGs or a JSON file of RLEs"
        ) from error
    except _JSON_ERRORS as error:
        raise DatasetError(
            f"{path} cannot be read as JSON: {error}. It is damaged or of another format. Write it "
            "anew."
        ) from error


def _mask_list(path: str | os.PathLike[str], content: Any) -> list:
    """The list of masks of any of the JSON formats."""
    if isinstance(content, dict) and _SEVERAL_IMAGES not in content:
        content = next((content[key] for key in _LISTS if key in content), None)
    if not isinstance(content, list):
        raise DatasetError(
            f"{path} has no list of masks; expected SAM's records or RLEs of a single image: in a "
            "list, or under 'annotations' as in SA-1B"
        )
    return content


def _checked(
    path: str | os.PathLike[str], masks: Sequence[Any], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """The compressed RLEs of records or RLEs of any content."""
    rles = []
    for number, mask in enumerate(masks):
        try:
            rles.append(_compressed(mask, size))
        except DatasetError as error:
            raise DatasetError(
                f"{path}, mask {number} of {len(masks)}: {error}. Make the masks of this image "
                "anew, at its size."
            ) from error
    return rles


def _compressed(mask: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Raises: DatasetError: says what is wrong, as part of a sentence."""
    rle = mask.get("segmentation", mask) if isinstance(mask, Mapping) else mask
    if not isinstance(rle, Mapping):
        raise DatasetError(
            f"a segmentation is of type {type(rle).__name__}; expected an RLE with 'size' and "
            "'counts'"
        )
    return compressed_rle(dict(rle), size)
