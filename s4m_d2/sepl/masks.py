"""SAM's masks of images, from files of other programs, or generated and stored in files.

For an image NAME a folder of masks has one of

- ``NAME/``: a PNG per mask, non-zero inside, as written by segment-anything's ``amg.py`` and SEPL's
  authors. A folder that is empty, or has only ``metadata.csv``, means that SAM found nothing.
- ``NAME.json``, ``NAME.json.gz``: a list of COCO RLEs, compressed or not, or of records with a
  ``segmentation`` (``amg.py --convert-to-rle``); or such a list under ``annotations`` (SA-1B) or
  under ``masks`` (:func:`kept_masks`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg

from s4m_d2.config import add_s4m_config
from s4m_d2.data.images import open_image, read_image
from s4m_d2.errors import ConfigError, DatasetError, WeightsError
from s4m_d2.files import atomic_write
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sepl.rule import checked_rles
from s4m_d2.structures import encode_masks, plain_rle

RLEs = list[dict[str, Any]]  # compressed, counts as str

_OPTIONS = {"BACKEND": "--sam", "MODEL_TYPE": "--sam-type", "CHECKPOINT": "--sam-checkpoint"}
_ENDINGS = ("", ".json", ".json.gz")
_SUMMARY = "metadata.csv"  # written by amg.py beside the PNGs
_JSON_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error)


@dataclass(frozen=True)
class SamMasks:
    """Generates SAM's automatic masks of images by a model of each process, and stores them."""

    model: tuple[str, str, str]  #: values of --sam, --sam-type and --sam-checkpoint
    device: str  #: PyTorch's name
    cache: Path  #: folder with a file per image
    automatic: AutomaticMaskSettings

    def masks(self, name: str, image: Path, size: tuple[int, int]) -> RLEs:
        """Masks of the file ``image``, of ``size`` (H, W); stored ones if all is the same."""
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        return kept_masks(
            self.cache / f"{name}.json.gz",
            size,
            f"{self._generator.fingerprint()} {digest}",
            lambda: self._generator.generate(read_image(str(image), "RGB")),
        )

    @cached_property
    def _generator(self) -> AutomaticMasks:
        cfg = get_cfg()
        add_s4m_config(cfg)
        cfg.MODEL.DEVICE = self.device
        for key, value in zip(_OPTIONS, self.model, strict=True):
            cfg.S4M.SAM[key] = value
        try:
            return AutomaticMasks(build_sam_backend(cfg), self.automatic)
        except (ConfigError, WeightsError) as error:  # which name keys of the config
            text = str(error)
            for key, option in _OPTIONS.items():
                text = text.replace(f"S4M.SAM.{key}", option)
            raise type(error)(text) from error


def read_masks(folder: Path, name: str, size: tuple[int, int]) -> RLEs:
    """Read the masks of the image ``name``, of ``size`` (H, W), in one of the formats above.

    DatasetError: they are missing, in two places, damaged or of another size.
    """
    found = [place for ending in _ENDINGS if (place := folder / f"{name}{ending}").exists()]
    if not found:
        raise DatasetError(
            f"'{folder}' has no folder {name}, {name}.json or {name}.json.gz. If names of "
            "pseudo-labels have an end of their own, give --suffix."
        )
    if len(found) > 1:
        raise DatasetError(f"{found[0]} and {found[1]} are both masks of {name}. Remove one.")
    [source] = found
    return _read_folder(source, size) if source.is_dir() else _read_file(source, size)


def kept_masks(
    path: Path, size: tuple[int, int], fingerprint: str, make: Callable[[], Sequence[dict]]
) -> RLEs:
    """Read an image's masks from a file of an earlier call, or make and write SAM's records.

    Args:
        path: ends with ``.json.gz``; :func:`read_masks` reads it.
        size: (H, W) of the image.
        fingerprint: of everything that the masks depend on; files with another one, of another
            size, and damaged ones are replaced.
    """
    try:
        content = _read_json(path)
        if (content["size"], content["fingerprint"]) == (list(size), fingerprint):
            return _rles(content["masks"], size)
    except (DatasetError, LookupError, TypeError):
        pass
    records = list(make())
    content = {"size": list(size), "fingerprint": fingerprint, "masks": records}
    text = json.dumps(content, separators=(",", ":")).encode()
    with atomic_write(path, "wb") as file:
        file.write(gzip.compress(text, mtime=0))  # equal masks make equal files
    return _rles(records, size)


def _read_folder(folder: Path, size: tuple[int, int]) -> RLEs:
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    masks = [file for file in files if file.suffix.lower() == ".png"]
    others = [file.name for file in files if file.name != _SUMMARY]
    if others and not masks:
        raise DatasetError(f"{folder} has no PNG, but {others[0]}. Convert the masks.")
    masks.sort(key=lambda file: (len(file.stem), file.stem))  # by number
    return [_read_png(file, size) for file in masks]


def _read_png(file: Path, size: tuple[int, int]) -> dict[str, Any]:
    with open_image(file) as image:
        values = np.asarray(image)
    if values.shape != size:
        raise DatasetError(
            f"{file} has the shape {values.shape}; expected {size} (height, width) like the "
            "pseudo-label, in a single channel of 0 and 255."
        )
    [rle] = encode_masks(torch.from_numpy(values != 0)[None])
    return plain_rle(rle)


def _read_file(path: Path, size: tuple[int, int]) -> RLEs:
    content = _read_json(path)
    if isinstance(content, dict) and "images" not in content:  # COCO's files are of many images
        content = content.get("masks", content.get("annotations"))
    if not isinstance(content, list):
        raise DatasetError(f"{path} has no list of SAM's records or RLEs of a single image.")
    try:
        return _rles(content, size)
    except DatasetError as error:
        raise DatasetError(f"{path}, {error}. Make the masks anew, at its image's size.") from error


def _read_json(path: Path) -> Any:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except _JSON_ERRORS as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}. Write it anew.") from error


def _rles(masks: Sequence[Any], size: tuple[int, int]) -> RLEs:
    parts = [mask.get("segmentation", mask) if isinstance(mask, dict) else mask for mask in masks]
    return checked_rles(parts, size)
