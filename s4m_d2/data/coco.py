"""Data sets in COCO's layout: one folder of images, one JSON file of instances."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from detectron2.data.datasets import load_coco_json

from s4m_d2.data.coco_checks import check_chosen, check_content
from s4m_d2.data.listing import IMAGE_EXTENSIONS, dataset_path, list_images
from s4m_d2.errors import DatasetError


@dataclass(frozen=True)
class CocoFormat:
    """A data set with a COCO instances file.

    Attributes:
        json_file, image_root: relative paths lie under $DETECTRON2_DATASETS.
        classes: metadata known beforehand (thing_classes, ...); empty: taken from the file.
        remedy: what a user does when the data set is missing.
    """

    json_file: str
    image_root: str
    classes: dict = field(default_factory=dict, hash=False)
    remedy: str = "Set DETECTRON2_DATASETS to the folder that holds it."

    def metadata(self) -> dict:
        """What Detectron2's evaluators and visualizer read, but for the paths."""
        return {**self.classes, "evaluator_type": "coco"}

    def paths(self) -> dict[str, str]:
        """Where the data set lies now."""
        image_root = dataset_path(self.image_root)
        return {
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
        """Records of the chosen images, through Detectron2's own COCO loader.

        Args:
            choose: from the file names of all images to those wanted.
            dataset_name: whose metadata receive the classes; None leaves COCO's category ids.

        Raises:
            DatasetError: the file is missing, malformed or refers to what it does not contain;
                a chosen image is not on disk; the classes differ from those expected.
        """
        json_file, image_root = dataset_path(self.json_file), dataset_path(self.image_root)
        content = self._read(json_file)
        chosen = set(choose([image["file_name"] for image in content["images"]]))
        subset = _subset(content, chosen)
        check_chosen(subset["images"], subset["annotations"], json_file, image_root)
        missing = [n for n in sorted(chosen) if not os.path.isfile(os.path.join(image_root, n))]
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(chosen)} images that {json_file} lists are not in "
                f"{image_root}, the first is {missing[0]}. {self.remedy}"
            )
        with tempfile.TemporaryDirectory(prefix="s4m_coco_") as folder:
            path = os.path.join(folder, os.path.basename(json_file))
            with open(path, "w") as file:
                json.dump(subset, file)
            try:
                return load_coco_json(path, image_root, dataset_name)
            except (AssertionError, ArithmeticError, KeyError, TypeError, ValueError) as error:
                raise DatasetError(
                    f"{json_file} cannot be used as data set {dataset_name!r}: {error} "
                    "Correct the file, or register it under a name of its own."
                ) from error

    def _read(self, json_file: str) -> dict:
        try:
            with open(json_file, encoding="utf-8") as file:
                content = json.load(file)
        except FileNotFoundError as error:
            raise DatasetError(f"{json_file} does not exist. {self.remedy}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(
                f"{json_file} is no valid JSON: {error}. Replace it with a fresh copy."
            ) from error
        check_content(content, json_file)
        return content


def _subset(content: dict, file_names: set[str]) -> dict:
    """The same categories with the chosen images and their annotations."""
    images = [image for image in content["images"] if image["file_name"] in file_names]
    ids = {image["id"] for image in images}
    annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": content["categories"]}
