"""Own data: COCO files and folders anywhere, registered under fixed names."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.data.coco import CocoFormat
from s4m_d2.data.listing import unlabeled_records
from s4m_d2.errors import DatasetError

LABELED, UNLABELED, VALIDATION = "own_labeled", "own_unlabeled", "own_val"


@dataclass(frozen=True)
class OwnCoco(CocoFormat):
    """A COCO file whose classes are told apart by their names.

    Attributes:
        categories: entries of "categories" that the file's are mapped to; (): its own.
        file_names: of the images that are used; None: all.
    """

    categories: tuple[dict, ...] = field(default=(), hash=False)
    file_names: frozenset[str] | None = None

    def choose(self, names: Sequence[str]) -> list[str]:
        """Of all file names those that are used, in their order."""
        return [name for name in names if self.file_names is None or name in self.file_names]

    def read(self) -> dict:
        """The checked content of the file, with the ids of :attr:`categories`.

        Raises:
            DatasetError: the file is missing or malformed, two categories have one name, or the
                names are not those of :attr:`categories`.
        """
        return self._read(self.json_file)

    def _read(self, json_file: str) -> dict:
        content = super()._read(json_file)
        own = {category["name"]: category["id"] for category in content["categories"]}
        if len(own) < len(content["categories"]):
            names = [category["name"] for category in content["categories"]]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DatasetError(
                f"{json_file}: 'categories' names {', '.join(twice)} more than once. Classes are "
                "told apart by their names: make these unique."
            )
        if len({isinstance(category_id, str) for category_id in own.values()}) > 1:
            raise DatasetError(
                f"{json_file}: the ids of 'categories' are numbers and texts. Number them anew."
            )
        if not self.categories:
            return content
        wanted = {category["name"]: category["id"] for category in self.categories}
        if own.keys() != wanted.keys():
            raise DatasetError(
                f"{json_file} has other categories than the labeled images: "
                f"{_difference(own, wanted)}. Write the same names in both files (their ids may "
                "differ)."
            )
        ids = {own_id: wanted[name] for name, own_id in own.items()}
        annotations = [
            {**row, "category_id": ids[row["category_id"]]} for row in content["annotations"]
        ]
        return {**content, "annotations": annotations, "categories": list(self.categories)}


def _difference(own: Iterable[str], wanted: Iterable[str]) -> str:
    own, wanted = set(own), set(wanted)
    parts = []
    if wanted - own:
        parts.append(f"it lacks {', '.join(sorted(wanted - own))}")
    if own - wanted:
        parts.append(f"it adds {', '.join(sorted(own - wanted))}")
    return " and ".join(parts)


def register_own_data(
    classes: Sequence[str],
    *,
    labeled: OwnCoco,
    unlabeled: tuple[str, Sequence[str]] | None = None,
    validation: tuple[OwnCoco, str] | None = None,
) -> None:
    """Register ``own_labeled``, ``own_unlabeled`` and ``own_val``; what had these names goes.

    Args:
        classes: names in the order of contiguous ids.
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
    _register_coco(LABELED, labeled, labeled.json_file, classes)
    if validation is not None:
        _register_coco(VALIDATION, *validation, classes)
    if unlabeled is not None:
        folder, names = unlabeled
        paths = [os.path.join(folder, name) for name in names]
        # Headers are read once for the checks, the loader and the figures of a process.
        DatasetCatalog.register(
            UNLABELED, functools.cache(lambda: unlabeled_records(paths, folder))
        )
        MetadataCatalog.get(UNLABELED).set(image_dir=folder)


def _register_coco(name: str, dataset: OwnCoco, json_file: str, classes: Sequence[str]) -> None:
    DatasetCatalog.register(name, lambda: dataset.load(dataset.choose, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=dataset.image_root,
        evaluator_type="coco",
        thing_classes=list(classes),
    )
