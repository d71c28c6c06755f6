"""The default map from a record to a model's input."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable

from . import detection_utils as utils
from . import transforms as T


class DatasetMapper:
    """Read the image, augment it and, if ``is_train``, its annotations, convert to tensors.

    instance_mask_format: "polygon" or "bitmask". recompute_boxes: use the masks' tight boxes,
    which a crop may make smaller than the cropped boxes.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, augmentations: list[T.Augmentation | T.Transform],
        image_format: str, use_instance_mask: bool = False, instance_mask_format: str = "polygon",
        recompute_boxes: bool = False,
    ):  # fmt: skip
        assert use_instance_mask or not recompute_boxes, "recompute_boxes requires instance masks"
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.recompute_boxes = recompute_boxes
        logging.getLogger(__name__).info(f"is_train={is_train}, augmentations: {augmentations}")

    @classmethod
    def from_config(cls, cfg: Any, is_train: bool = True) -> dict[str, Any]:
        augs = utils.build_augmentation(cfg, is_train)
        crop = cfg.INPUT.CROP.ENABLED and is_train
        if crop:
            augs.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return {
            "is_train": is_train,
            "augmentations": augs,
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "recompute_boxes": crop and cfg.MODEL.MASK_ON,
        }

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Replace "annotations" by "instances", without crowds and empty instances."""
        annos = [a for a in dataset_dict.pop("annotations") if a.get("iscrowd", 0) == 0]
        for anno in annos:
            anno.pop("keypoints", None)
            if not self.use_instance_mask:
                anno.pop("segmentation", None)
            utils.transform_instance_annotations(anno, transforms, image_shape)
        instances = utils.annotations_to_instances(annos, image_shape, self.instance_mask_format)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """A new record with "image" (C, H, W) and, in training, "instances"."""
        dataset_dict = copy.deepcopy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict
