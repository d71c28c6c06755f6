"""Labeled images: geometry, color distortion and instances."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances

from s4m_d2.data.build import DATASET_MAPPER_REGISTRY
from s4m_d2.data.images import is_turned, read_image
from s4m_d2.data.masks import tight_boxes, transform_masks
from s4m_d2.data.sampling import SampleSeeds, start_sample
from s4m_d2.data.transforms import ColorDistortion, apply_geometry, build_geometry, of_tile
from s4m_d2.errors import DatasetError, InputError


class LabeledDatasetMapper:
    """Turn a labeled record into a training sample, for any Detectron2 training loader.

    Args:
        is_train: must be True; use Detectron2's own DatasetMapper for testing.
        geometry: Detectron2 augmentations that need the image only.
        color: distortion of the view, or None.
        image_format: "RGB" or "BGR".
        num_classes: class ids must be below it.
        keep_empty: S4M.KEEP_EMPTY_INSTANCES.
        rng: seeds the samples of a loader that attaches no "seeds"; default: the system's entropy.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        geometry: Sequence[T.Augmentation],
        color: ColorDistortion | None,
        image_format: str,
        num_classes: int,
        keep_empty: bool = False,
        rng: np.random.Generator | None = None,
    ) -> None:
        if not is_train:
            raise InputError("This mapper is for training; test with Detectron2's DatasetMapper.")
        self._geometry = list(geometry)
        self._color = color
        self._image_format = image_format
        self._num_classes = num_classes
        self._keep_empty = keep_empty
        self._seeds = SampleSeeds(rng)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {
            "is_train": is_train,
            "geometry": build_geometry(cfg),
            "color": ColorDistortion(cfg.INPUT.FORMAT) if cfg.INPUT.COLOR_AUG_SSD else None,
            "image_format": cfg.INPUT.FORMAT,
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
        seeds = self._seeds.of(record)
        geometry = of_tile(self._geometry, record)
        view, transforms = apply_geometry(geometry, image, seeds.geometry, record["file_name"])
        sample = start_sample(record, image)
        sample["instances"] = self._instances(record, transforms, image.shape[:2], view.shape[:2])
        if self._color is not None:
            view = self._color(view, seeds.color())
        sample["image"] = torch.from_numpy(view.transpose(2, 0, 1).copy())
        return sample

    def _instances(self, record, transforms, image_size, view_size) -> Instances:
        annotations = [
            (index, annotation)
            for index, annotation in enumerate(record["annotations"])
            if not annotation.get("iscrowd", 0)
        ]
        for index, annotation in annotations:
            check_annotation(record["file_name"], index, annotation, self._num_classes)
        try:
            masks = transform_masks(
                [annotation["segmentation"] for _, annotation in annotations],
                transforms,
                image_size,
                view_size,
            )
        except DatasetError as error:
            raise DatasetError(
                f"Annotations of {record['file_name']}: {error}. Correct or remove the annotation."
            ) from error
        classes = torch.tensor([a["category_id"] for _, a in annotations], dtype=torch.int64)
        boxes = tight_boxes(masks)
        kept = boxes.any(1) | self._keep_empty
        return Instances(
            view_size,
            gt_classes=classes[kept],
            gt_masks=BitMasks(masks if kept.all() else masks[kept]),
            gt_boxes=Boxes(boxes[kept]),
        )


def check_annotation(file_name: str, index: int, annotation: dict, num_classes: int) -> None:
    """Refuse an annotation that lacks its class or segmentation, or is of a class out of range.

    Raises:
        DatasetError: names the image and the annotation.
    """
    where = f"Annotation {index} of {file_name}"
    lacking = [key for key in ("category_id", "segmentation") if key not in annotation]
    if lacking:
        raise DatasetError(f"{where} lacks {' and '.join(lacking)}.")
    class_id = annotation["category_id"]
    if class_id not in range(num_classes):
        raise DatasetError(
            f"{where} has the class id {class_id}, but the model has {num_classes} "
            "classes, from 0 on. Correct the annotation or MODEL.SEM_SEG_HEAD.NUM_CLASSES."
        )


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
