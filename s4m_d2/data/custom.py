"""Own data: COCO files and folders anywhere, registered under fixed names."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.data.annotations import Annotations
from s4m_d2.data.listing import unlabeled_records

LABELED, UNLABELED, VALIDATION = "own_labeled", "own_unlabeled", "own_val"


def register_own_data(
    *,
    labeled: Annotations,
    unlabeled: tuple[str, Sequence[str]] | None = None,
    validation: tuple[Annotations, str] | None = None,
) -> None:
    """Register ``own_labeled``, ``own_unlabeled`` and ``own_val``, in place of earlier ones.

    Args:
        labeled: training set.
        unlabeled: a folder, and paths below it.
        validation: validation set, and the path of the evaluator's COCO file, which may be written
            later.
    """
    for name in (LABELED, UNLABELED, VALIDATION):
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)
    _register_coco(LABELED, labeled, labeled.json_file)
    if validation is not None:
        _register_coco(VALIDATION, *validation)
    if unlabeled is not None:
        folder, names = unlabeled
        paths = [os.path.join(folder, name) for name in names]
        # Headers are read once per process, for checks, loader and figures.
        DatasetCatalog.register(
            UNLABELED, functools.cache(lambda: unlabeled_records(paths, folder))
        )
        MetadataCatalog.get(UNLABELED).set(image_dir=folder)


def _register_coco(name: str, annotations: Annotations, json_file: str) -> None:
    DatasetCatalog.register(name, lambda: list(annotations.records))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=annotations.image_root,
        evaluator_type="coco",
        **annotations.metadata(),
    )
