"""Registers COCO 2017 and Cityscapes under ``$DETECTRON2_DATASETS`` (default: ``./datasets``)."""

from __future__ import annotations

import functools
import os

from ..catalog import DatasetCatalog, MetadataCatalog
from .builtin_meta import get_cityscapes_metadata, get_coco_metadata
from .cityscapes import load_cityscapes_instances
from .coco import register_coco_instances

_COCO_SPLITS = ("train", "val")
_CITYSCAPES_SPLITS = ("train", "val", "test")


def _register_coco(root: str) -> None:
    for split in _COCO_SPLITS:
        register_coco_instances(
            f"coco_2017_{split}",
            get_coco_metadata(),
            os.path.join(root, f"coco/annotations/instances_{split}2017.json"),
            os.path.join(root, f"coco/{split}2017"),
        )


def _register_cityscapes(root: str) -> None:
    for split in _CITYSCAPES_SPLITS:
        name = f"cityscapes_fine_instance_seg_{split}"
        image_dir = os.path.join(root, f"cityscapes/leftImg8bit/{split}/")
        gt_dir = os.path.join(root, f"cityscapes/gtFine/{split}/")
        DatasetCatalog.register(
            name, functools.partial(load_cityscapes_instances, image_dir, gt_dir)
        )
        MetadataCatalog.get(name).set(
            image_dir=image_dir,
            gt_dir=gt_dir,
            evaluator_type="cityscapes_instance",
            **get_cityscapes_metadata(),
        )


_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
_register_coco(_ROOT)
_register_cityscapes(_ROOT)
