"""Files of images and videos: finding, listing and reading them, with errors that name the file."""

import contextlib
import functools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import unquote

import cv2
import numpy as np
from detectron2.data import detection_utils
from PIL import ExifTags, Image

from s4m_d2.errors import DatasetError, S4MError, attempt
from s4m_d2.files import atomic_write, digest

IMAGE_EXTENSIONS = tuple(".jpg .jpeg .png .bmp .webp .tif .tiff .jfif .gif .jp2 .ppm .pgm".split())
# Files of folders that this project's commands wrote.
_WRITTEN = {"run.json", "config.yaml"}, {".label.json"}, {"predictions.json", "images.json"}
_UNREAD = ".heic .heif .avif .jxl .dng .cr2 .nef .arw .psd".split()  # pictures
VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_UPLOAD = re.compile(r"(?<![^/])[0-9a-f]{8}-(?=[^/]+$)")  # Label Studio's, before a name
_COPY = re.compile(r"\.rf\.\w+(?=\.\w+$)")  # Roboflow's, in the names of augmented copies
_SCALE = "Scale them to 0..255 and save the image with 8 bits per channel."
#: What Pillow raises for a damaged, truncated or foreign file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_EXIF_SOURCES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
# Transposition for each EXIF orientation of an image that is not stored upright.
_TURNS: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,  # from here on, height and width are swapped
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_image(file_name: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image with Pillow; its errors in the block become a DatasetError with the name."""
    try:
        with Image.open(file_name) as image:
            yield image
    except DatasetError:  # which is a ValueError too
        raise
    except READ_ERRORS as error:
        raise unreadable(str(file_name), error) from error


def read_image(file_name: str, image_format: str) -> np.ndarray:
    """Decode an image, rotated as its EXIF data say: (H, W, 3) uint8, contiguous, in
    ``image_format``, "RGB" or "BGR".

    Gray and palette images become color, transparency is dropped, of several frames the first is
    read, of 16-bit color the upper 8 bits. DatasetError: the file is missing, damaged, no image, or
    has gray values of more than 8 bits, whose range is not known, or 16-bit color of 12 bits.
    """
    with open_image(file_name) as image:
        _check_depth(image, file_name)
        is_deep = ";16" in str(getattr(image, "tile", ())[:1])  # how the decoder calls the values
        image.load()  # before reading the orientation, which would hide damage of a PNG
        turn = _TURNS.get(orientation(image))
        upright = image if turn is None else image.transpose(turn)
        array = detection_utils.convert_PIL_to_numpy(upright, image_format)
    if is_deep and array.max() < 16:
        raise DatasetError(f"{file_name} has 16-bit color of values below 4,096 only. {_SCALE}")
    return np.ascontiguousarray(array)


def _check_depth(image: Image.Image, file_name: str) -> None:
    if image.mode.startswith(("I", "F")):
        found = f"gray values of more than 8 bits (Pillow's mode {image.mode})"
        raise DatasetError(f"{file_name} has {found}. {_SCALE}")


def image_size(file_name: str) -> tuple[int, int]:
    """(H, W) of an image after EXIF rotation, from its header; DatasetError: it is damaged."""
    with open_image(file_name) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    # Reading the orientation of a PNG without these would decode all of it.
    is_described = any(source in image.info for source in _EXIF_SOURCES)
    is_transposed = is_described and orientation(image) in (5, 6, 7, 8)
    return (width, height) if is_transposed else (height, width)


def read_sizes(
    paths: Sequence[str], decoded: Collection[str] = ()
) -> list[tuple[tuple[int, int] | None, list[S4MError]]]:
    """(H, W) of each image as :func:`image_size`; or None, and why it cannot be read. Those of
    ``decoded`` are read to their ends, of the others the headers."""

    def read(path: str) -> tuple[int, int]:
        if path in decoded:
            return read_image(path, "RGB").shape[:2]
        with open_image(path) as image:
            _check_depth(image, path)
            return _upright_size(image)

    with ThreadPool(4) as pool:
        return pool.map(functools.partial(attempt, read), paths, 8)  # one by one takes longer


def check_size(record: dict, size: tuple[int, int]) -> None:
    """DatasetError unless an image has the (H, W) of its record, if that has one."""
    expected = record.get("height", size[0]), record.get("width", size[1])
    if size != expected:
        raise DatasetError(
            f"{record['file_name']} has (height, width) {size}, but its annotations say "
            f"{expected}. Replace the image or the annotations; if it was annotated without the "
            "rotation of its EXIF data, remove these (exiftool -Orientation= FILES)."
        )


def orientation(image: Image.Image) -> int | None:
    """EXIF orientation, 1 to 8; None: not given."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many kinds on broken EXIF data, which Detectron2 ignores
        return None


def unreadable(file_name: str, error: Exception) -> DatasetError:
    """The error for a file that cannot be used."""
    remedy = "Correct the path."
    if not isinstance(error, FileNotFoundError):
        remedy = "Replace it with a fresh copy; cut an image that is too large."
    return DatasetError(f"{file_name} cannot be read: {error}. {remedy}")


def dataset_path(path: str) -> str:
    """``path`` itself if absolute, else under $DETECTRON2_DATASETS (default: ``datasets``)."""
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, os.path.expanduser(path))


def list_images(image_dir: str, suffixes: tuple[str, ...], remedy: str) -> list[str]:
    """List the files below a folder whose names end in one of ``suffixes``, sorted.

    Hidden files and folders, pipes and devices are left out. Links are followed, but each folder
    is visited once, and before links beside it. Broken links are listed. What a run, s4m-label or
    s4m-predict wrote below the folder is left out.
    DatasetError: there is no folder, or no such file in it; ``remedy`` ends the message.
    """
    if not os.path.exists(image_dir):
        raise DatasetError(f"The folder of images {image_dir} does not exist. {remedy}")
    if not os.path.isdir(image_dir):
        raise DatasetError(f"{image_dir} is no folder. {remedy}")
    paths: list[str] = []
    others: Counter[str] = Counter()  # by ending
    wanted = tuple(suffix.lower() for suffix in suffixes)
    visited = {str(folder) for folder in Path(os.path.realpath(image_dir)).parents}
    for folder, below, names in os.walk(image_dir, onerror=logger.warning, followlinks=True):
        real = os.path.realpath(folder)
        written = folder != image_dir and any(marks <= {*names} for marks in _WRITTEN)
        if real in visited or written:
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not _is_hidden(name))
        below.sort(key=lambda name: os.path.islink(os.path.join(folder, name)))
        for path in (os.path.join(folder, name) for name in names if not _is_hidden(name)):
            is_file = os.path.isfile(path) or not os.path.exists(path)
            if is_file and path.lower().endswith(wanted):
                paths.append(path)
            else:
                others[os.path.splitext(path)[1].lower()] += 1
    if unread := [f"{others[e]:,} {e}" for e in (*_UNREAD, *VIDEO_EXTENSIONS) if e in others]:
        text = "%s: files cannot be read here and are left out: %s. Convert them to JPEG or PNG."
        logger.warning(text, image_dir, ", ".join(unread))
    if not paths:
        raise DatasetError(
            f"The folder {image_dir} holds no image that ends in {', '.join(suffixes)}. {remedy}"
        )
    return sorted(paths)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # which macOS adds to archives


def find_below(folder: str, given: str) -> str:
    """The longest end of a file name that leads to a file of the folder; "": none does.

    Tools write paths of their machines, addresses, backslashes, percent codes and names of uploads;
    systems differ in case, and in composed or decomposed letters.
    """
    path = given.replace("\\", "/")
    plain = unquote(path.replace("?d=", "/").partition("?")[0])
    for text in dict.fromkeys((given, path, plain, _UPLOAD.sub("", plain))):
        parts = text.split("/")
        for name in (os.path.normpath("/".join(parts[start:])) for start in range(len(parts))):
            is_there = os.path.isfile(os.path.join(folder, name))
            found = name if is_there else _names_below(folder).get(folded(name))
            if found and not name.startswith((os.sep, os.pardir)):
                return found
    return ""


def folded(name: str) -> str:
    """Remove differences of case, of composed and decomposed letters, and those that uploads make:
    they replace spaces and drop brackets and other signs."""
    plain = unicodedata.normalize("NFC", name).casefold().replace(" ", "_")
    return re.sub(r"[^-\w./]", "", plain)


@functools.lru_cache(4)
def _names_below(folder: str) -> dict[str, str]:
    """Paths of files below the folder, by their :func:`folded` forms; "": of several files."""
    names: dict[str, str] = {}
    for parent, _, files in os.walk(folder):
        for name in (os.path.relpath(os.path.join(parent, file), folder) for file in files):
            names[folded(name)] = "" if folded(name) in names else name
    return names


def list_unlabeled(
    image_dir: str,
    frames_dir: str,
    every: int = 1,
    *,
    validation: Mapping[str, str],
    labeled: Iterable[str],
) -> tuple[list[str], dict[str, int]]:
    """List images below a folder as :func:`list_images`, without those of the content of a labeled
    one, or of the relative path of a validation image.

    Args:
        image_dir: searched recursively; or a video.
        frames_dir, every: every n-th frame of a video is an image, written there once.
        validation: paths of the validation images, and the same relative to their folder.
        labeled: paths of other labeled images.

    Returns:
        Paths below ``image_dir``, sorted, those of frames absolute; numbers left out, by reason.

    Raises:
        DatasetError: the folder does not exist or holds no other image, or a video is damaged.
    """
    remedy = "--unlabeled (S4M.DATA.UNLABELED) names a folder of unlabeled images, or a video."
    names = _images_and_frames(image_dir, frames_dir, every, remedy)
    known = {os.path.normpath(name) for name in validation.values()}
    held_out = copies(names, validation) | {path for path in names if names[path] in known}
    known_labels = copies(names, labeled) - held_out
    kept = [name for path, name in names.items() if path not in held_out | known_labels]
    if not kept:
        raise DatasetError(
            f"The folder {image_dir} has {len(names)} images, all of them labeled or in the "
            "validation set: nothing is left to train on. An image that the json lists without "
            f"annotations counts as labeled, and as empty. {remedy}"
        )
    left_out = {"in the validation set": len(held_out), "labeled": len(known_labels)}
    return kept, {reason: count for reason, count in left_out.items() if count}


def _images_and_frames(image_dir: str, frames_dir: str, every: int, remedy: str) -> dict[str, str]:
    """Names, see :func:`list_unlabeled`, by path."""
    frames_dir = os.path.abspath(frames_dir)
    is_video = os.path.isfile(image_dir) and image_dir.lower().endswith(VIDEO_EXTENSIONS)
    endings = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
    paths = [image_dir] if is_video else list_images(image_dir, endings, remedy)
    root = os.path.dirname(image_dir) if is_video else image_dir
    names: dict[str, str] = {}
    for path in paths:
        name = os.path.relpath(path, root)
        if path.lower().endswith(VIDEO_EXTENSIONS):
            names |= {f: f for f in _write_frames(path, os.path.join(frames_dir, name), every)}
        elif not path.startswith(os.path.join(frames_dir, "")):
            names[path] = name
    return names


def photograph(name: str) -> str:
    """Make the name that the augmented copies of a photograph share; other names stay.

    >>> photograph("a/cat_jpg.rf.0f1e2d3c.jpg")
    'a/cat_jpg.jpg'
    """
    return _COPY.sub("", name)


def _exported(name: str) -> tuple[str, bool]:
    """Name of a photograph in its copies by Roboflow, and whether this is one.

    >>> _exported("a/cat.png"), _exported("b/cat_png.rf.0f1e2d3c.jpg")
    (('cat_png', False), ('cat_png', True))
    """
    plain = photograph(name)
    stem, ending = os.path.splitext(os.path.basename(plain))
    return folded(stem if plain != name else f"{stem}_{ending[1:]}"), plain != name


def copies(paths: Iterable[str], originals: Iterable[str]) -> set[str]:
    """Those of ``paths`` with the content of one of ``originals`` (what cannot be read has none),
    or of the same photograph by the names that Roboflow gives to its copies."""
    known = set(map(_exported, originals))
    names = {path: _exported(path) for path in paths}
    named = {p for p, (name, c) in names.items() if {(name, True), (name, not c)} & known}
    for key in (_size, _middle, digest):  # each reads more bytes, of fewer files
        wanted = {path: key(path) for path in originals}
        values = set(wanted.values()) - {None, ""}
        keys = {path: key(path) for path in paths} if values else {}
        paths = [path for path in keys if keys[path] in values]
        found = {keys[path] for path in paths}
        originals = [path for path in wanted if wanted[path] in found]
    return named | {*paths}


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _middle(path: str) -> bytes | None:
    """Some bytes from the middle of a file, as many files begin alike."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(file.seek(0, os.SEEK_END) // 2)
            return file.read(4096)
    except OSError:
        return None


def _write_frames(path: str, folder: str, every: int) -> list[str]:
    """Write every n-th frame of a video as NAME_000010.jpg, once; returns their paths."""
    stem = os.path.join(folder, os.path.splitext(os.path.basename(path))[0])
    video = os.stat(path)
    # Written last: the number of frames.
    done = os.path.join(folder, f".every-{every}-{video.st_size}-{video.st_mtime_ns}")
    if not os.path.isfile(done):
        count = 0
        for index, frame in enumerate(Video(path)):
            if index % every == 0:
                quality = (cv2.IMWRITE_JPEG_QUALITY, 95)
                _, encoded = cv2.imencode(".jpg", frame[:, :, ::-1], quality)
                with atomic_write(f"{stem}_{index:06d}.jpg", "wb") as file:
                    file.write(encoded.tobytes())
                count += 1
        with atomic_write(done) as file:
            file.write(str(count))
    with open(done, encoding="ascii") as file:
        return [f"{stem}_{index * every:06d}.jpg" for index in range(int(file.read()))]


def unlabeled_records(paths: list[str], image_dir: str) -> list[dict]:
    """Make records with "file_name", "image_id" (path below ``image_dir``), "height" and "width"
    of the headers; of a damaged one, "unreadable", the reason: the loader skips and counts it."""

    records = []
    for path, (size, errors) in zip(paths, read_sizes(paths), strict=True):
        found = {"height": size[0], "width": size[1]} if size else {"unreadable": str(errors[0])}
        records.append({"file_name": path, "image_id": os.path.relpath(path, image_dir), **found})
    return records


class Video:
    """A video, read one frame at a time; DatasetError: it is missing or cannot be read.

    Attributes:
        path: as given.
        fps: frames per second; 25 if it has no rate.
        announced: number of frames in its header; 0: unknown.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        capture = cv2.VideoCapture(path) if os.path.isfile(path) else None  # not an address
        if capture is None or not capture.isOpened():
            problem = "does not exist" if capture is None else "cannot be read as a video"
            raise DatasetError(f"{path} {problem}. Give one that OpenCV can open, such as .mp4.")
        self._capture = capture
        fps = capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < np.inf else 25.0
        self.announced = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, (H, W, 3) uint8 RGB, once; DatasetError at the end if some are missing."""
        count = 0
        try:
            while (read := self._capture.read())[0]:
                count += 1
                yield cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        finally:
            self._capture.release()
        if count == 0 or count < 0.95 * self.announced:  # which some formats only estimate
            raise DatasetError(
                f"{self.path} ends after {count} of {self.announced} frames: it is damaged or "
                "truncated. Replace it with a fresh copy."
            )
