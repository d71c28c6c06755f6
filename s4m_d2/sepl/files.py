"""Files by image: label maps (class index per pixel, or CAM scores), SAM's masks, names, lists."""

import gzip
import json
import os
import pickle
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from PIL import Image

from s4m_d2.data.images import IMAGE_EXTENSIONS, READ_ERRORS, image_size, list_images, open_image
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write, read_lines
from s4m_d2.restricted_pickle import load_arrays
from s4m_d2.sepl.rule import BACKGROUND, VOID, checked_rles
from s4m_d2.structures import encode_masks, plain_rle

RLEs = list[dict[str, Any]]  # compressed, counts as str

# Kinds of files of an image: label maps, but for the first.
IMAGE, TRUTH, BEFORE, AFTER = "image", "ground truth", "pseudo-label", "enhanced label"
LABEL_ENDINGS = (".png", ".npy")
BACKGROUND_SCORE = 0.15  # as in IRN's evaluation of its CAMs

_VOC_THINGS = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,"
    "person,pottedplant,sheep,sofa,train,tvmonitor"
).split(",")
PRESETS = {
    "voc": ("background", *_VOC_THINGS),
    # COCO 2014 has the classes of 2017.
    "coco": ("background", *MetadataCatalog.get("coco_2017_train").thing_classes),
}


def class_names(
    preset: str = "voc", count: int | None = None, file: Path | None = None
) -> tuple[str, ...]:
    """Class names, "background" first, from a file, a number of classes, or a preset."""
    if file is None and count is None:
        return PRESETS[preset]
    numbered = [f"class {index}" for index in range(1, count or 1)]
    source = file or f"--num-classes {count}"
    names = tuple(read_lines(file) if file else ("background", *numbered))
    names = (*(name.lower() for name in names[:1]), *names[1:])
    is_named = names[:1] == ("background",) and len({*names} - {""}) == len(names)
    if not is_named or not 2 <= len(names) <= VOID:
        raise DatasetError(
            f"{source} gives {len(names)} classes; expected 2 to {VOID} different names, one per "
            "line, 'background' first"
        )
    return names


def palette() -> np.ndarray:
    """VOC's colors of the indices 0..255, (256, 3) uint8 RGB."""
    # The bits of an index alternate between the channels, the lowest is the highest of each.
    bits = np.arange(256)[:, None] >> np.arange(9) & 1
    weights = 128 >> np.arange(9) // 3
    return (bits * weights).reshape(256, 3, 3).sum(axis=1).astype(np.uint8)


def read_label(
    path: str | os.PathLike[str],
    num_classes: int = VOID,
    background_score: float = BACKGROUND_SCORE,
) -> np.ndarray:
    """Read a label map, (H, W) uint8, as stored: EXIF orientations are ignored.

    Args:
        path: PNG with a palette (its colors are ignored), gray with 8 bits, or RGB with three equal
            channels; or ``.npy``: (H, W) integers, or CAM scores.
        num_classes: with background; other indices are refused, except 255 (void).
        background_score: a pixel is background if no CAM score exceeds it.

    DatasetError: the file is missing, damaged, of another kind, or has other classes.
    """
    try:
        is_array = os.fspath(path).lower().endswith(".npy")
        label = _read_npy(path, background_score) if is_array else _read_png(path)
    except (*READ_ERRORS, pickle.UnpicklingError) as error:
        remedy = "Write it anew: class indices, 0 for background and 255 for void, or CAM scores."
        raise DatasetError(f"{path} cannot be read: {error}. {remedy}") from error
    unknown = np.unique(label[(label >= num_classes) & (label != VOID)])
    if len(unknown):
        raise DatasetError(
            f"{path} has class indices {unknown.tolist()}; expected 0..{num_classes - 1} or void, "
            f"{VOID}. Give its classes: --preset, --num-classes or --class-names."
        )
    return label


def write_label(path: str | os.PathLike[str], label: np.ndarray) -> None:
    """Write an (H, W) uint8 label map as a PNG with VOC's palette, atomically."""
    image = Image.fromarray(np.ascontiguousarray(label))
    image.putpalette(palette().tobytes())
    with atomic_write(path, "wb") as file:
        image.save(file, format="PNG")


def _read_png(path: str | os.PathLike[str]) -> np.ndarray:
    with Image.open(path) as image:
        image.verify()  # checksums, which decoding alone does not check
    with Image.open(path) as image, open(path, "rb") as file:
        kind, mode, label = image.format, image.mode, np.array(image)
        bits = file.read(25)[-1]  # of a PNG; Pillow scales gray of 2 and 4 bits
    if label.ndim == 3 and (label == label[..., :1]).all():
        label = label[..., 0]
    is_scaled = mode != "P" and bits != 8
    if kind != "PNG" or mode not in ("P", "L", "RGB") or label.ndim != 2 or is_scaled:
        raise ValueError(
            f"it is {kind} {mode}; expected class indices in a PNG: with a palette, gray with 8 "
            "bits, or RGB of 8 bits with equal channels, no colors of classes"
        )
    return label


def _read_npy(path: str | os.PathLike[str], background_score: float) -> np.ndarray:
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        *_, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject:
            return _label_of_scores(load_arrays(file), background_score)
    values = np.load(path, mmap_mode="r")  # does not allocate for a truncated file
    if values.ndim != 2 or dtype.kind not in "iu" or values.min() < 0 or values.max() > VOID:
        raise ValueError(
            f"it has {values.shape} {dtype}; expected (H, W) integers in 0..{VOID}, or a "
            "dictionary of CAM scores"
        )
    return values.astype(np.uint8)


def _label_of_scores(content: Any, background_score: float) -> np.ndarray:
    """(H, W) uint8: the class with the highest CAM score, or background if none exceeds its score.

    content: ``{class: (H, W) scores, ...}``, or ``{"keys": (K,) classes, NAME: (K, H, W) scores,
    ...}`` (of several NAMEs the one with most pixels). Classes count from 0 without background: 0
    is class 1 of a label map. If "keys" has one more entry than there are maps, it includes the
    background and counts as label maps do; so do maps that are probabilities, of sum 1 with that of
    0, the background's (PSA's CRF). ValueError: the content has another form.
    """
    with suppress(TypeError, ValueError, IndexError, AttributeError):
        if "keys" in content:
            keys = np.asarray(content["keys"])
            stacks = [np.asarray(value) for value in content.values() if np.ndim(value) == 3]
            scores = max(stacks, key=lambda stack: stack.shape[1] * stack.shape[2])
        else:
            keys, scores = np.array(list(content)), np.stack(list(content.values()))
        scores = scores.astype(np.float32, casting="same_kind")  # no complex ones
        background = np.full_like(scores[:1], background_score)
        if 1 < len(keys) == len(scores) and keys[0] == BACKGROUND:
            if np.abs(scores.sum(axis=0) - 1).max() < 0.01:  # which no normalized CAMs are
                background, scores = scores[:1], scores[1:]
        has_background = len(keys) == len(scores) + 1 and keys[0] == BACKGROUND
        classes = keys[1:] if has_background else keys + 1
        are_classes = bool(((classes > BACKGROUND) & (classes < VOID)).all())
        fit = scores.ndim == 3 and classes.shape == scores.shape[:1]
        in_range = np.isfinite(scores).all() and scores.max() < 1.01
        if classes.dtype.kind in "iu" and are_classes and fit and in_range:
            best = np.concatenate([background, scores]).argmax(0)
            return np.append(BACKGROUND, classes).astype(np.uint8)[best]
    raise ValueError(
        "expected {class: (H, W) scores} or {'keys': (K,) classes, NAME: (K, H, W) scores}, "
        "at most 1, classes counted from 0 without background"
    )


def read_masks(folder: Path, name: str, size: tuple[int, int]) -> RLEs:
    """Read the masks of the image NAME, of ``size`` (H, W), from one of

    - ``NAME/``: a PNG per mask, non-zero inside, as segment-anything's ``amg.py`` writes them;
      without any, or with only ``metadata.csv``, SAM found nothing;
    - ``NAME.json``, ``NAME.json.gz``: a list of COCO RLEs, compressed or not, or of records with a
      ``segmentation``; or such a list under ``annotations`` (SA-1B) or ``masks``.

    DatasetError: they are missing, in two places, damaged or of another size.
    """
    places = (folder / f"{name}{ending}" for ending in ("", ".json", ".json.gz"))
    found = [place for place in places if place.exists()]
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

    ``path`` ends with ``.json.gz``; :func:`read_masks` reads it. Files of another ``fingerprint``
    of all that the masks depend on, of another ``size`` (H, W), and damaged ones are replaced.
    """
    try:
        content = _read_json(path)
        if (content["size"], content["fingerprint"]) == (list(size), fingerprint):
            return checked_rles(content["masks"], size)
    except (DatasetError, LookupError, TypeError):
        pass
    records = make()
    content = {"size": list(size), "fingerprint": fingerprint, "masks": records}
    text = json.dumps(content, separators=(",", ":")).encode()
    with atomic_write(path, "wb") as file:
        file.write(gzip.compress(text, mtime=0))  # equal masks make equal files
    return checked_rles(records, size)


def _read_folder(folder: Path, size: tuple[int, int]) -> RLEs:
    files = [file for file in folder.iterdir() if not file.name.startswith(".")]
    masks = [file for file in files if file.suffix.lower() == ".png"]
    others = [file.name for file in files if file.name != "metadata.csv"]  # amg.py's summary
    if others and not masks:
        raise DatasetError(f"{folder} has no PNG, but {others[0]}. Convert the masks.")
    masks.sort(key=lambda file: (len(file.stem), file.stem))  # by number
    return [_mask_of_png(file, size) for file in masks]


def _mask_of_png(file: Path, size: tuple[int, int]) -> dict[str, Any]:
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
        return checked_rles(content, size)
    except DatasetError as error:
        raise DatasetError(f"{path}, {error}. Make the masks anew, at its image's size.") from error


def _read_json(path: Path) -> Any:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}. Write it anew.") from error


class ImageFiles:
    """Images and their label maps in several folders: ``by_kind``, kind → name of image → file.

    Args:
        folders: kind (``IMAGE``, ``TRUTH``, ``BEFORE``, ``AFTER``) → folder; None: not given.
        class_names: of the label maps, with background.
        suffix: end of the pseudo-labels' names, after those of the images.
        background_score: of :func:`read_label`.

    DatasetError: a folder is missing or empty, or has two files of the same name.
    """

    def __init__(
        self,
        folders: Mapping[str, Path | None],
        class_names: Sequence[str],
        suffix: str,
        background_score: float,
    ) -> None:
        endings, ends = {IMAGE: IMAGE_EXTENSIONS}, {BEFORE: suffix}
        self.by_kind = {
            kind: files_by_name(folder, endings.get(kind, LABEL_ENDINGS), ends.get(kind, ""))
            for kind, folder in folders.items()
            if folder is not None
        }
        self.class_names = class_names
        self.background_score = background_score

    def read_labels(self, name: str) -> dict[str, np.ndarray]:
        """Read an image's label maps by kind, (H, W) uint8.

        DatasetError: a file of any kind is missing or damaged, a label map has other classes, or
        the sizes differ, also that of the image, rotated according to its EXIF data.
        """
        labels: dict[str, np.ndarray] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        for kind, files in self.by_kind.items():
            if name not in files:
                raise DatasetError(f"no {kind} of this name")
            if kind == IMAGE:
                sizes[kind] = image_size(str(files[name]))
                continue
            label = read_label(files[name], len(self.class_names), self.background_score)
            labels[kind], sizes[kind] = label, label.shape
        if len({*sizes.values()}) > 1:
            found = ", ".join(f"{kind} {size}" for kind, size in sizes.items())
            raise DatasetError(f"its files differ in (height, width): {found}")
        return labels


def files_by_name(
    folder: Path, endings: tuple[str, ...] = LABEL_ENDINGS, suffix: str = ""
) -> dict[str, Path]:
    """Find the files below a folder that have one of the endings, by the name of their image.

    ``suffix`` ends the stems, after the image's name; other files are left out. DatasetError: the
    folder is missing, has no such file, or two of the same name.
    """
    remedy = f"Give the folder of the files NAME{suffix}."
    files: dict[str, Path] = {}
    for path in map(Path, list_images(str(folder), endings, remedy)):
        name = path.stem.removesuffix(suffix)
        if path.stem.endswith(suffix) and name and files.setdefault(name, path) != path:
            raise DatasetError(f"{files[name]} and {path} are both of {name}. Take one away.")
    if not files:
        raise DatasetError(f"'{folder}' has no file NAME{suffix}. {remedy}")
    return files


def image_list(path: Path) -> list[str]:
    """Read names of images from a text file such as VOC's train.txt, each once, in order.

    The name is the first word of a line, without folder and image extension: some lists have pairs
    "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png". DatasetError: the file is
    missing, not text, or empty.
    """
    words = [line.split()[0].replace("\\", "/") for line in read_lines(path) if line]
    parts = [os.path.splitext(os.path.basename(word)) for word in words]
    endings = {"", *IMAGE_EXTENSIONS, *LABEL_ENDINGS}
    names = [name if end.lower() in endings else name + end for name, end in parts]
    if not any(names):
        raise DatasetError(f"{path} names no image. Write the name of an image on each line.")
    return [name for name in dict.fromkeys(names) if name]
