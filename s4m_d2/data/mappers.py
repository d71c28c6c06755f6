"""Mappers: labeled images with instances, unlabeled images in two views, images for measuring.

Labeled and weak views have the same distribution: the same geometry and color distortion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from s4m_d2.data.annotations import targets
from s4m_d2.data.build import DATASET_MAPPER_REGISTRY
from s4m_d2.data.images import check_size, read_image
from s4m_d2.data.segmentations import annotation_masks
from s4m_d2.data.transforms import ColorDistortion, apply_geometry, build_geometry, of_tile
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.structures import mask_boxes

_PASSED_KEYS = ("file_name", "image_id", "seeds", "stream_position")


class _Mapper:
    """Draws a record's view with the loader's seed, or a fresh one.

    Args:
        is_train: must be True; use Detectron2's own DatasetMapper for testing.
        geometry: Detectron2 augmentations that need the image only.
        color: distortion of the view, or None.
        image_format: "RGB" or "BGR".
        num_classes: class ids must be below it.
        keep_empty: keep instances outside the view.
    """

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        geometry: Sequence[T.Augmentation],
        color: ColorDistortion | None = None,
        image_format: str,
        num_classes: int = 0,
        keep_empty: bool = False,
    ) -> None:
        if not is_train:
            raise InputError("This mapper is for training; test with Detectron2's DatasetMapper.")
        self._geometry = list(geometry)
        self._color = color
        self._image_format = image_format
        self._num_classes = num_classes
        self._keep_empty = keep_empty

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

    def _views(self, record: dict) -> tuple[dict, np.ndarray, np.ndarray, T.TransformList]:
        """A sample's first keys, its plain and color-distorted view, and the transforms."""
        image = read_image(record["file_name"], self._image_format)
        seeds = record.get("seeds")
        seed = seeds["augment"] if seeds else int(np.random.default_rng().integers(2**63))
        geometry = of_tile(self._geometry, record)
        view, transforms = apply_geometry(geometry, image, seed, record["file_name"])
        colored = view
        if self._color is not None:
            draws = np.random.SeedSequence(seed, spawn_key=(1,))  # apart from the geometry's
            colored = self._color(view, np.random.default_rng(draws))
        sample = {key: record[key] for key in _PASSED_KEYS if key in record}
        sample["height"], sample["width"] = image.shape[:2]
        return sample, view, colored, transforms

    def _annotated(
        self, record: dict, annotations: Sequence[dict]
    ) -> tuple[dict, _Targets, Tensor]:
        """A sample with its image, its instances in the view's frame, and which annotations (N,)
        bool they are of."""
        name = record["file_name"]
        sample, view, colored, transforms = self._views(record)
        size = sample["height"], sample["width"]
        check_size(record, size)
        labels = [row.get("category_id") for row in annotations]
        if wrong := [label for label in labels if label not in range(self._num_classes)]:
            raise DatasetError(
                f"An annotation of {name} has the category_id {wrong[0]}, but the model has "
                f"{self._num_classes} classes. Correct it or MODEL.SEM_SEG_HEAD.NUM_CLASSES."
            )
        masks = annotation_masks(name, annotations, transforms, size, view.shape[:2])
        boxes = mask_boxes(masks)
        kept = boxes.any(1) | self._keep_empty
        instances = _Targets(
            tuple(masks.shape[1:]),
            gt_classes=torch.tensor(labels, dtype=torch.int64)[kept],
            gt_masks=BitMasks(masks if kept.all() else masks[kept]),
            gt_boxes=Boxes(boxes[kept]),
        )
        return {**sample, "image": _as_tensor(colored)}, instances, kept


class _Targets(Instances):
    """Instances whose masks the loader can put into page-locked memory."""

    def pin_memory(self) -> _Targets:
        self.set("gt_masks", BitMasks(self.get("gt_masks").tensor.pin_memory()))
        return self


@DATASET_MAPPER_REGISTRY.register()
class ARPDatasetMapper(_Mapper):
    """Turn an unlabeled record into two views of the same geometry: "image", the plain one, for
    ARP and the strong view; "image_weak", with the color distortion, for teacher and SAM."""

    skip_unreadable = True  # the stream loader replaces an image that cannot be read

    def __call__(self, record: dict) -> dict:
        """Map one record to both views, (3, H, W) uint8; DatasetError: the image is damaged."""
        sample, view, weak, _ = self._views(record)
        return {**sample, "image": _as_tensor(view), "image_weak": _as_tensor(weak)}


class LabeledDatasetMapper(_Mapper):
    """Turn a labeled record into a training sample, for any Detectron2 training loader."""

    def __call__(self, record: dict) -> dict:
        """Map one record to a sample with "image", (3, H, W) uint8, and "instances" (gt_classes,
        gt_masks as BitMasks, gt_boxes) in the frame of the view.

        Crowds and, unless ``keep_empty``, instances outside the view are left out. DatasetError
        names the image, and what is wrong with it or with an annotation.
        """
        if "annotations" not in record:
            raise DatasetError(
                f"The record of {record['file_name']} has no annotations: it belongs to an "
                "unlabeled set, whose name goes into DATASETS.UNLABELED."
            )
        sample, instances, _ = self._annotated(record, targets(record))
        return {**sample, "instances": instances}


class TrueLabelsMapper(_Mapper):
    """Turn a record into the model's input in a test, with all annotations in the same frame."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {
            "geometry": detection_utils.build_augmentation(cfg, False),
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        }

    def __call__(self, record: dict) -> dict:
        """Map one record to a sample with "height" and "width" of the image or tile; "image",
        resized, (3, H, W) uint8; "truth", Instances of (H, W) with ``gt_classes`` (M,) int64,
        ``gt_masks`` BitMasks, ``gt_boxes`` and ``gt_crowds`` (M,) bool, without empty masks.
        Errors are those of :class:`LabeledDatasetMapper`."""
        rows = record["annotations"]  # of them, a crowd may have no region
        wanted = [row for row in rows if not row.get("iscrowd") or row.get("segmentation")]
        sample, truth, kept = self._annotated(record, wanted)
        if "tile" in record:
            left, top, right, bottom = record["tile"]
            sample["height"], sample["width"] = bottom - top, right - left
        crowds = [bool(row.get("iscrowd")) for row in wanted]
        truth.gt_crowds = torch.tensor(crowds, dtype=torch.bool)[kept]
        return {**sample, "truth": truth}


def _as_tensor(view: np.ndarray) -> Tensor:
    return torch.from_numpy(view.transpose(2, 0, 1).copy())


@DATASET_MAPPER_REGISTRY.register()
def mask_former_instance(cfg: CfgNode, is_train: bool = True) -> LabeledDatasetMapper:
    """Resize, crop of fixed size, flip (Cityscapes)."""
    return LabeledDatasetMapper(cfg, is_train)


@DATASET_MAPPER_REGISTRY.register()
def coco_instance_lsj(cfg: CfgNode, is_train: bool = True) -> LabeledDatasetMapper:
    """Large-scale jitter (COCO)."""
    return LabeledDatasetMapper(cfg, is_train)
