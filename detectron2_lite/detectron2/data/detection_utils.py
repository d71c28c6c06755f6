"""The steps between a record of a data set and what a model takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from detectron2.utils.file_io import PathManager
from PIL import Image

from . import transforms as T
from .catalog import MetadataCatalog

_EXIF_ORIENTATION_TAG = 274
_UNDO_EXIF_ORIENTATION = {
    2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
    6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90,
}  # fmt: skip


class SizeMismatchError(ValueError):
    """An image's size is not the one its record states."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image file, turned upright as its EXIF data says, to (H, W, C) uint8.

    format: "BGR" or a PIL mode; None keeps the file's own, which may give (H, W) or another type.
    """
    with PathManager.open(file_name, "rb") as f:
        image = Image.open(f)
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION_TAG)
        except Exception:  # PIL raises many kinds of errors on broken EXIF data: ignore the data
            orientation = None
        if orientation in _UNDO_EXIF_ORIENTATION:
            image = image.transpose(_UNDO_EXIF_ORIENTATION[orientation])
        return convert_PIL_to_numpy(image, format)


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """A PIL image as an array in ``format``; see :func:`read_image`."""
    if format is not None:
        image = image.convert("RGB" if format == "BGR" else format)
    array = np.asarray(image)
    if format == "L":
        return array[:, :, None]
    return array[:, :, ::-1] if format == "BGR" else array


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Raise SizeMismatchError unless the image has the record's "width" and "height", which are
    filled in if absent.
    """
    height, width = image.shape[:2]
    if "width" in dataset_dict or "height" in dataset_dict:
        expected = (dataset_dict["width"], dataset_dict["height"])
        if (width, height) != expected:
            name = f" for image {dataset_dict['file_name']}" if "file_name" in dataset_dict else ""
            raise SizeMismatchError(
                f"Mismatched image shape{name}, got {(width, height)}, expect {expected}. "
                "Please check the width/height in your annotation."
            )
    dataset_dict.update(width=width, height=height)


def transform_instance_annotations(
    annotation: dict[str, Any], transforms: T.Transform | list[T.Transform],
    image_size: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """Transform the box and segmentation of one instance, in place.

    "bbox" becomes XYXY_ABS, clipped to the transformed image of ``image_size`` (H, W); polygons
    stay polygons (a crop may drop or split them), an RLE becomes an (H, W) array. Keypoints are
    not supported.
    """
    if "keypoints" in annotation:
        raise NotImplementedError("detectron2 lite cannot transform keypoints: drop them.")
    if isinstance(transforms, (tuple, list)):
        transforms = T.TransformList(transforms)
    height, width = image_size
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    box = transforms.apply_box(np.array([box]))[0].clip(min=0)
    annotation["bbox"] = np.minimum(box, [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS

    segm = annotation.get("segmentation")
    if isinstance(segm, list):
        polygons = [np.asarray(p).reshape(-1, 2) for p in segm]
        annotation["segmentation"] = [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
    elif isinstance(segm, dict):
        mask = transforms.apply_segmentation(mask_util.decode(segm))
        assert mask.shape == tuple(image_size), (mask.shape, image_size)
        annotation["segmentation"] = mask
    elif "segmentation" in annotation:
        raise ValueError(f"A segmentation is a list of polygons or an RLE dict, got {type(segm)}.")
    return annotation


def annotations_to_instances(
    annos: list[dict[str, Any]], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """Collect an image's annotations: ``gt_boxes`` XYXY, ``gt_classes`` (N,) int64 and, if the
    first annotation has a segmentation, ``gt_masks``, PolygonMasks or (``mask_format`` "bitmask")
    BitMasks.

    Raises ValueError for segmentations that ``mask_format`` cannot hold.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    target = Instances(image_size)
    target.gt_boxes = Boxes(np.stack(boxes) if annos else np.zeros((0, 4)))
    target.gt_classes = torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64)
    if annos and "segmentation" in annos[0]:
        segms = [a["segmentation"] for a in annos]
        if mask_format == "polygon":
            target.gt_masks = PolygonMasks(segms)
        else:
            assert mask_format == "bitmask", mask_format
            masks = [np.ascontiguousarray(_to_bitmask(s, image_size)) for s in segms]
            target.gt_masks = BitMasks(torch.stack([torch.from_numpy(m) for m in masks]))
    return target


def _to_bitmask(segm: Any, image_size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool or uint8 from polygons, an RLE or a mask."""
    if isinstance(segm, list):
        return polygons_to_bitmask(segm, *image_size)
    if isinstance(segm, dict):
        return mask_util.decode(segm)
    if isinstance(segm, np.ndarray):
        assert segm.ndim == 2, f"Expect segmentation of 2 dimensions, got {segm.ndim}."
        return segm
    raise ValueError(f"A mask is a list of polygons, an RLE dict or an array, got {type(segm)}.")


def filter_empty_instances(instances: Instances, *, box_threshold: float = 1e-5) -> Instances:
    """Drop instances with a box side of at most ``box_threshold`` px or an empty mask."""
    keep = instances.gt_boxes.nonempty(threshold=box_threshold)
    if instances.has("gt_masks"):
        keep = keep & instances.gt_masks.nonempty()
    return instances[keep]


def check_metadata_consistency(key: str, dataset_names: list[str]) -> None:
    """Raise ValueError if the data sets differ in metadata ``key``."""
    entries = {name: getattr(MetadataCatalog.get(name), key) for name in dataset_names}
    if any(entry != entries[dataset_names[0]] for entry in entries.values()):
        raise ValueError(f"Datasets have different metadata '{key}'! {entries}")


def build_augmentation(cfg: Any, is_train: bool) -> list[T.Augmentation]:
    """Resize and, for training, flip, as ``cfg.INPUT`` says."""
    inp = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge(inp.MIN_SIZE_TEST, inp.MAX_SIZE_TEST, "choice")]
    augs: list[T.Augmentation] = [
        T.ResizeShortestEdge(inp.MIN_SIZE_TRAIN, inp.MAX_SIZE_TRAIN, inp.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if inp.RANDOM_FLIP != "none":
        horizontal, vertical = inp.RANDOM_FLIP == "horizontal", inp.RANDOM_FLIP == "vertical"
        augs.append(T.RandomFlip(horizontal=horizontal, vertical=vertical))
    return augs
