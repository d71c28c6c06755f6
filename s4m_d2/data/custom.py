"""Own data: COCO files and folders anywhere, registered under fixed names."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.data.annotations import Annotations
from s4m_d2.data.listing import IMAGE_EXTENSIONS, list_images, unlabeled_records
from s4m_d2.errors import DatasetError

LABELED, UNLABELED, VALIDATION = "own_labeled", "own_unlabeled", "own_val"


def list_unlabeled(image_dir: str, left_out: Collection[str] = ()) -> tuple[list[str], int]:
    """Images below a folder, but those of the validation split.

    Args:
        image_dir: searched recursively.
        left_out: file names whose stems (name without folder and extension) are left out.

    Returns:
        Paths below ``image_dir``, sorted, and how many were left out.

    Raises:
        DatasetError: the folder does not exist or holds no other image.
    """
    remedy = "--unlabeled (S4M.DATA.UNLABELED) names the folder of unlabeled images."
    paths = list_images(image_dir, IMAGE_EXTENSIONS, remedy)
    stems = {_stem(name) for name in left_out}
    kept = [os.path.relpath(path, image_dir) for path in paths if _stem(path) not in stems]
    if not kept:
        raise DatasetError(
            f"The folder {image_dir} holds {len(paths)} images, all of them in the validation "
            f"set: nothing is left to train on. {remedy}"
        )
    return kept, len(paths) - len(kept)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def register_own_data(
    *,
    labeled: Annotations,
    unlabeled: tuple[str, Sequence[str]] | None = None,
    validation: tuple[Annotations, str] | None = None,
) -> None:
    """Register ``own_labeled``, ``own_unlabeled`` and ``own_val``; what had these names goes.

    Args:
        labeled: what to train on.
        unlabeled: a folder, and paths below it.
        validation: what to evaluate on, and where the COCO file lies, or will lie, that the
            evaluator compares with.
    """
    for name in (LABELED, UNLABELED, VALIDATION):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)
    _register_coco(LABELED, labeled, labeled.json_file)
    if validation is not None:
        _register_coco(VALIDATION, *validation)
    if unlabeled is not None:
        folder, names = unlabeled
        paths = [os.path.join(folder, name) for name in names]
        DatasetCatalog.register(UNLABELED, lambda: unlabeled_records(paths, folder))
        MetadataCatalog.get(UNLABELED).set(image_dir=folder)


def _register_coco(name: str, annotations: Annotations, json_file: str) -> None:
    DatasetCatalog.register(name, lambda: list(annotations.records))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=annotations.image_root,
        evaluator_type="coco",
        **annotations.metadata(),
    )
