"""The true labels of unlabeled images, where there are any: to measure with, never to train on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances

from s4m_d2.data.images import read_image
from s4m_d2.data.mappers import annotated_masks, as_tensor, check_image_size
from s4m_d2.data.splits import unlabeled_format
from s4m_d2.data.subsets import name_key
from s4m_d2.data.transforms import apply_geometry, of_tile
from s4m_d2.errors import DatasetError


def has_true_labels(name: str) -> bool:
    """Whether a data set's name says where labels of its images are; no file is looked at.

    So it is of unlabeled sets that :func:`~s4m_d2.data.register_splits` made.
    """
    return unlabeled_format(name) is not None


def true_records(
    names: Sequence[str],
    max_images: int = 0,
    known: Collection[str] = (),
    load: Callable[[str], list[dict]] = DatasetCatalog.get,
) -> list[dict]:
    """Records of images with their annotations, in a fixed order that mixes folders.

    The order follows from the files' names alone. So the first images are the same everywhere, and
    of a larger number the smaller one is the beginning.

    Args:
        names: unlabeled sets with labels (:func:`has_true_labels`), or any labeled ones.
        max_images: of all sets together; 0: all.
        known: paths of images to leave out, such as those that a model was trained on.
        load: reads a labeled set by its name.

    Raises:
        DatasetError: the labels of a set are missing or malformed, or nothing is left.
    """
    known = {os.path.abspath(path) for path in known}
    records = [record for name in names for record in _records_of(name, max_images, known, load)]
    records.sort(key=lambda record: _place(record["file_name"]))
    if not records:
        raise DatasetError(
            f"{', '.join(names)}: no image is left to compare pseudo-labels on, as training reads "
            "the labels of all of them. Name other data sets in S4M.QUALITY.DATASETS."
        )
    return records[: max_images or None]


def _records_of(
    name: str,
    max_images: int,
    known: Collection[str],
    load: Callable[[str], list[dict]],
) -> list[dict]:
    def choose(paths: Sequence[str], folder: str = "") -> list[str]:
        left = (p for p in paths if os.path.abspath(os.path.join(folder, p)) not in known)
        return list(itertools.islice(sorted(left, key=_place), max_images or None))

    dataset = unlabeled_format(name)
    if dataset is not None:
        folder = dataset.paths()["image_dir"]
        try:
            return dataset.load(lambda paths: choose(paths, folder), name)
        except DatasetError as error:
            raise DatasetError(f"The true labels of '{name}' cannot be read: {error}") from error
    records = {record["file_name"]: record for record in load(name)}
    if not any("annotations" in record for record in records.values()):
        raise DatasetError(
            f"The data set '{name}' has no labels: how good pseudo-labels of its images are cannot "
            "be known. Name a labeled set in S4M.QUALITY.DATASETS, such as one for validation."
        )
    return [records[path] for path in choose(list(records)) if "annotations" in records[path]]


def _place(path: str) -> tuple[bytes, str]:
    return name_key(os.path.basename(path)), path


class TrueLabelsMapper:
    """A record as the model sees its image in a test, with all annotations in the same frame.

    Args:
        geometry: augmentations that draw nothing.
        image_format: "RGB" or "BGR".
        num_classes: class ids must be below it.
    """

    @configurable
    def __init__(
        self, *, geometry: Sequence[T.Augmentation], image_format: str, num_classes: int
    ) -> None:
        self._geometry = list(geometry)
        self._image_format = image_format
        self._num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {
            "geometry": detection_utils.build_augmentation(cfg, False),
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        }

    def __call__(self, record: dict) -> dict[str, Any]:
        """Map one record, which stays as it is.

        Returns:
            "file_name"; "height" and "width" of the image or tile; "image", it resized, (3, H, W)
            uint8; "truth", Instances of (H, W) with ``gt_classes`` (M,) int64, ``gt_masks``
            BitMasks and ``gt_crowds`` (M,) bool, regions with many instances that are not told
            apart. What has no pixel in the frame is left out.

        Raises:
            DatasetError: names the image, and what is wrong with it or with which annotation.
        """
        name = record["file_name"]
        image = read_image(name, self._image_format)
        check_image_size(record, image.shape[:2])
        view, transforms = apply_geometry(of_tile(self._geometry, record), image, 0, name)
        left, top, right, bottom = record.get("tile", (0, 0, image.shape[1], image.shape[0]))
        annotations, masks = annotated_masks(
            record,
            # a crowd may have no region
            lambda a: not a.get("iscrowd", 0) or bool(a.get("segmentation")),
            self._num_classes,
            transforms,
            image.shape[:2],
            view.shape[:2],
        )
        visible = masks.flatten(1).any(dim=1)
        truth = Instances(
            view.shape[:2],
            gt_classes=_column(annotations, "category_id", torch.int64)[visible],
            gt_masks=BitMasks(masks[visible]),
            gt_crowds=_column(annotations, "iscrowd", torch.bool)[visible],
        )
        return {
            "file_name": name,
            "height": bottom - top,
            "width": right - left,
            "image": as_tensor(view),
            "truth": truth,
        }


def _column(annotations: Sequence[dict], key: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([annotation.get(key, 0) for annotation in annotations], dtype=dtype)
