"""Where data sets lie, and listing their images without looking at annotations."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from s4m_d2.data.images import image_size
from s4m_d2.errors import DatasetError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

_READERS = 8  # threads that wait for the headers of images


def dataset_path(path: str) -> str:
    """``path`` itself if absolute, else under $DETECTRON2_DATASETS (default: ``datasets``)."""
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, os.path.expanduser(path))


def list_images(image_dir: str, suffixes: tuple[str, ...], remedy: str) -> list[str]:
    """Paths of the files below a folder whose names end in one of ``suffixes``, sorted.

    Raises:
        DatasetError: the folder does not exist or holds no such file; ``remedy`` ends the message.
    """
    if not os.path.isdir(image_dir):
        raise DatasetError(f"The folder of images {image_dir} does not exist. {remedy}")
    paths = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(image_dir, followlinks=True)
        for name in names
        if name.lower().endswith(tuple(suffix.lower() for suffix in suffixes))
        and not name.startswith(".")
    ]
    if not paths:
        raise DatasetError(
            f"The folder {image_dir} holds no image that ends in {' or '.join(suffixes)}. {remedy}"
        )
    return sorted(paths)


def unlabeled_records(paths: list[str], image_dir: str) -> list[dict]:
    """Records with "file_name", "image_id" (path below ``image_dir``), "height" and "width".

    Sizes come from the headers. An image with a damaged header keeps its record, without a size:
    the loader meets it, skips it and counts it.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda path: _unlabeled_record(path, image_dir), paths))


def _unlabeled_record(path: str, image_dir: str) -> dict:
    record = {"file_name": path, "image_id": os.path.relpath(path, image_dir)}
    try:
        height, width = image_size(path)
    except DatasetError:
        return record
    return {**record, "height": height, "width": width}
