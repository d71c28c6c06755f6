"""Data sets in COCO's layout: one folder of images, one JSON file of instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from detectron2.data import MetadataCatalog

from s4m_d2.data.annotations import read_annotations
from s4m_d2.data.listing import IMAGE_EXTENSIONS, dataset_path, list_images


@dataclass(frozen=True)
class CocoFormat:
    """A data set with a COCO instances file; relative paths start at $DETECTRON2_DATASETS."""

    json_file: str
    image_root: str
    #: Known metadata (thing_classes, ...); empty: taken from the file.
    classes: dict = field(default_factory=dict, hash=False)
    #: End of the message if the data set is missing.
    remedy: str = "Set DETECTRON2_DATASETS to the folder that holds it."

    def metadata(self) -> dict:
        """Metadata for Detectron2's evaluators and visualizer, with the current paths."""
        image_root = dataset_path(self.image_root)
        return {
            **self.classes,
            "evaluator_type": "coco",
            "json_file": dataset_path(self.json_file),
            "image_root": image_root,
            "image_dir": image_root,
        }

    def unlabeled_images(self) -> list[str]:
        """Paths of all images, sorted; the JSON file is not opened."""
        return list_images(dataset_path(self.image_root), IMAGE_EXTENSIONS, self.remedy)

    def load(
        self, choose: Callable[[Sequence[str]], list[str]], dataset_name: str | None = None
    ) -> list[dict]:
        """Read the records of the chosen images.

        Args:
            choose: file names of all images -> file names of the wanted images.
            dataset_name: data set whose metadata are updated with the classes.

        Raises:
            DatasetError: as :func:`~s4m_d2.data.annotations.read_annotations`.
        """
        annotations = read_annotations(
            dataset_path(self.json_file),
            dataset_path(self.image_root),
            classes=self.classes.get("thing_classes", ()),
            choose=choose,
            remedy=self.remedy,
        )
        if dataset_name is not None:
            vars(MetadataCatalog.get(dataset_name)).update(annotations.metadata())
        return list(annotations.records)
