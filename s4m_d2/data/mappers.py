"""Mappers of training: labeled images with instances, unlabeled images in two views.

Both share geometry and color distortion, so that labeled and weak views are of one distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from s4m_d2.data.build import DATASET_MAPPER_REGISTRY
from s4m_d2.data.images import is_turned, read_image
from s4m_d2.data.segmentations import transform_masks
from s4m_d2.data.transforms import ColorDistortion, apply_geometry, build_geometry, of_tile
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.structures import mask_boxes

_PASSED_KEYS = ("file_name", "image_id", "seeds", "stream_position")
_SEED_BITS = 63
_COLOR_STREAM = (1,)  # apart from the stream of the geometry's draws


class _TrainingMapper:
    """Draws a record's view: from the seed of its loader, or a fresh one."""

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        geometry: Sequence[T.Augmentation],
        color: ColorDistortion | None,
        image_format: str,
    ) -> None:
        if not is_train:
            raise InputError("This mapper is for training; test with Detectron2's DatasetMapper.")
        self._geometry = list(geometry)
        self._color = color
        self._image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {
            "is_train": is_train,
            "geometry": build_geometry(cfg),
            "color": ColorDistortion(cfg.INPUT.FORMAT) if cfg.INPUT.COLOR_AUG_SSD else None,
            "image_format": cfg.INPUT.FORMAT,
        }

    def _views(
        self, record: dict, image: np.ndarray
    ) -> tuple[dict, np.ndarray, np.ndarray, T.TransformList]:
        """The first keys of a sample, its view plain and in other colors, and the transforms."""
        seeds = record.get("seeds")
        seed = seeds["augment"] if seeds else int(np.random.default_rng().integers(2**_SEED_BITS))
        geometry = of_tile(self._geometry, record)
        view, transforms = apply_geometry(geometry, image, seed, record["file_name"])
        colored = view
        if self._color is not None:
            draws = np.random.SeedSequence(seed, spawn_key=_COLOR_STREAM)
            colored = self._color(view, np.random.default_rng(draws))
        sample = {key: record[key] for key in _PASSED_KEYS if key in record}
        sample["height"], sample["width"] = image.shape[:2]
        return sample, view, colored, transforms


@DATASET_MAPPER_REGISTRY.register()
class ARPDatasetMapper(_TrainingMapper):
    """Turn an unlabeled record into two views of the same geometry; annotations are never read.

    "image" is the geometric view: ARP pastes on it and the strong view starts from it.
    "image_weak" adds the color distortion: the teacher and SAM see it.

    Args:
        is_train: must be True.
        geometry: Detectron2 augmentations that need the image only.
        color: distortion of the weak view, or None.
        image_format: "RGB" or "BGR".
    """

    skip_unreadable = True  # the stream loader replaces an image that cannot be read

    def __call__(self, record: dict) -> dict:
        """Map one record, which stays as it is.

        Returns:
            A sample with "image" and "image_weak", both (3, H, W) uint8, content only.

        Raises:
            DatasetError: the image is missing, damaged or truncated.
        """
        image = read_image(record["file_name"], self._image_format)
        sample, view, weak, _ = self._views(record, image)
        return {**sample, "image": as_tensor(view), "image_weak": as_tensor(weak)}


class LabeledDatasetMapper(_TrainingMapper):
    """Turn a labeled record into a training sample, for any Detectron2 training loader.

    Args:
        is_train: must be True; use Detectron2's own DatasetMapper for testing.
        num_classes: class ids must be below it.
        keep_empty: S4M.KEEP_EMPTY_INSTANCES.
        views: ``geometry``, ``color`` and ``image_format``, as of :class:`ARPDatasetMapper`.
    """

    @configurable
    def __init__(
        self, is_train: bool = True, *, num_classes: int, keep_empty: bool = False, **views: Any
    ) -> None:
        super().__init__(is_train, **views)
        self._num_classes = num_classes
        self._keep_empty = keep_empty

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {
            **super().from_config(cfg, is_train),
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "keep_empty": cfg.S4M.KEEP_EMPTY_INSTANCES,
        }

    def __call__(self, record: dict) -> dict:
        """Map one record, which stays as it is.

        Returns:
            A sample with "image" ((3, H, W) uint8, content only) and "instances" (gt_classes,
            gt_masks as BitMasks, gt_boxes around them) in the frame of the view. Crowds and,
            unless ``keep_empty``, instances outside the view are left out.

        Raises:
            DatasetError: names the image, and what is wrong with it or with which annotation.
        """
        if "annotations" not in record:
            raise DatasetError(
                f"The record of {record['file_name']} has no annotations: it belongs to an "
                "unlabeled set, whose name goes into DATASETS.UNLABELED."
            )
        image = read_image(record["file_name"], self._image_format)
        check_image_size(record, image.shape[:2])
        sample, view, colored, transforms = self._views(record, image)
        annotations, masks = annotated_masks(
            record,
            lambda annotation: not annotation.get("iscrowd", 0),
            self._num_classes,
            transforms,
            image.shape[:2],
            view.shape[:2],
        )
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        boxes = mask_boxes(masks)
        kept = boxes.any(1) | self._keep_empty
        sample["instances"] = Instances(
            view.shape[:2],
            gt_classes=classes[kept],
            gt_masks=BitMasks(masks if kept.all() else masks[kept]),
            gt_boxes=Boxes(boxes[kept]),
        )
        sample["image"] = as_tensor(colored)
        return sample


def as_tensor(view: np.ndarray) -> Tensor:
    """(H, W, 3) as a new (3, H, W) tensor."""
    return torch.from_numpy(view.transpose(2, 0, 1).copy())


def annotated_masks(
    record: dict,
    is_wanted: Callable[[dict], bool],
    num_classes: int,
    transforms: T.TransformList,
    image_size: tuple[int, int],
    view_size: tuple[int, int],
) -> tuple[list[dict], Tensor]:
    """The annotations of a record that are wanted, and their masks, (N, H', W') bool, in its view.

    Raises:
        DatasetError: one lacks its class or segmentation, or has a wrong one; names it.
    """
    annotations = []
    for index, annotation in enumerate(record["annotations"]):
        if not is_wanted(annotation):
            continue
        where = f"Annotation {index} of {record['file_name']}"
        lacking = [key for key in ("category_id", "segmentation") if key not in annotation]
        if lacking:
            raise DatasetError(f"{where} lacks {' and '.join(lacking)}.")
        class_id = annotation["category_id"]
        if class_id not in range(num_classes):
            raise DatasetError(
                f"{where} has the class id {class_id}, but the model has {num_classes} "
                "classes, from 0 on. Correct the annotation or MODEL.SEM_SEG_HEAD.NUM_CLASSES."
            )
        annotations.append(annotation)
    segmentations = [annotation["segmentation"] for annotation in annotations]
    try:
        masks = transform_masks(segmentations, transforms, image_size, view_size)
    except DatasetError as error:
        raise DatasetError(
            f"Annotations of {record['file_name']}: {error}. Correct or remove the annotation."
        ) from error
    return annotations, masks


def check_image_size(record: dict, size: tuple[int, int]) -> None:
    """Refuse an image of another (H, W) than its record says.

    Raises:
        DatasetError: names the image and both sizes.
    """
    expected = record.get("height", size[0]), record.get("width", size[1])
    if size == expected:
        return
    remedy = "Replace the image or the annotations."
    if size == expected[::-1] and is_turned(record["file_name"]):
        remedy = (
            "Its EXIF orientation turns it upright, but it was annotated as it is stored. Remove "
            "the orientation from all such images (exiftool -Orientation= FILES)."
        )
    raise DatasetError(
        f"{record['file_name']} has (height, width) {size}, but its annotations say {expected}. "
        f"{remedy}"
    )


@DATASET_MAPPER_REGISTRY.register()
def mask_former_instance(cfg: CfgNode, is_train: bool = True) -> LabeledDatasetMapper:
    """Resize, crop of fixed size, flip (Cityscapes)."""
    return LabeledDatasetMapper(cfg, is_train)


@DATASET_MAPPER_REGISTRY.register()
def coco_instance_lsj(cfg: CfgNode, is_train: bool = True) -> LabeledDatasetMapper:
    """Large-scale jitter (COCO)."""
    return LabeledDatasetMapper(cfg, is_train)
