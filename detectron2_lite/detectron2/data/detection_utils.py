"""The steps between a record of a data set and what a model takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image

from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    PolygonMasks,
    polygons_to_bitmask,
)
from detectron2.utils.file_io import PathManager

from . import transforms as T
from .catalog import MetadataCatalog

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "build_augmentation",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "filter_empty_instances",
    "read_image",
    "transform_instance_annotations",
]

_YUV = "YUV-BT.601"  # https://en.wikipedia.org/wiki/YUV#SDTV_with_BT.601
_RGB_TO_YUV = np.array(
    [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]
)
_YUV_TO_RGB = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

_EXIF_ORIENTATION_TAG = 274
_UNDO_EXIF_ORIENTATION = {
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_270,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_90,
}


class SizeMismatchError(ValueError):
    """An image's size is not the one its record states."""


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image file upright, as its EXIF orientation says.

    Args:
        format: a PIL mode, "BGR" or "YUV-BT.601"; None keeps the file's own.

    Returns:
        (H, W, C), uint8 in [0, 255], or float64 with Y in [0, 1] for YUV. Only with
        ``format=None`` can a one-channel image come back as (H, W).
    """
    with PathManager.open(file_name, "rb") as f:
        return convert_PIL_to_numpy(_upright(Image.open(f)), format)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION_TAG)
    except Exception:  # PIL raises many kinds of errors on broken EXIF data: show it as it is
        return image
    method = _UNDO_EXIF_ORIENTATION.get(orientation)
    return image if method is None else image.transpose(method)


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """A PIL image as an array in ``format``; see :func:`read_image`."""
    if format is not None:
        image = image.convert("RGB" if format in ("BGR", _YUV) else format)
    array = np.asarray(image)
    if format == "L":
        return array[:, :, None]
    if format == "BGR":
        return array[:, :, ::-1]
    if format == _YUV:
        return np.dot(array / 255.0, _RGB_TO_YUV.T)
    return array


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """(H, W, C) in ``format`` to (H, W, 3) RGB in [0, 255]: uint8 from a PIL mode, else the type
    that comes out of the conversion.
    """
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if format == "BGR":
        return image[:, :, [2, 1, 0]]
    if format == _YUV:
        return np.dot(image, _YUV_TO_RGB.T) * 255.0
    image = image.astype(np.uint8)
    if format == "L":
        return np.repeat(image[:, :, :1], 3, axis=2)
    return image if format == "RGB" else np.asarray(Image.fromarray(image, format).convert("RGB"))


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compare "width" and "height" of the record with the image, and fill them in if absent.

    Raises:
        SizeMismatchError: they differ.
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
    dataset_dict.setdefault("width", width)
    dataset_dict.setdefault("height", height)


def transform_instance_annotations(
    annotation: dict[str, Any],
    transforms: T.Transform | list[T.Transform],
    image_size: tuple[int, int],
) -> dict[str, Any]:
    """Transform the box and segmentation of one instance.

    Args:
        annotation: changed in place. "bbox" becomes XYXY_ABS, clipped to the image; polygons stay
            polygons (cropping may drop or split them), an RLE becomes an (H, W) array.
        image_size: (H, W) after the transforms.

    Returns:
        ``annotation`` itself.
    """
    if "keypoints" in annotation:
        raise NotImplementedError(
            "detectron2 lite does not transform keypoints: drop them or install Detectron2."
        )
    if isinstance(transforms, (tuple, list)):
        transforms = T.TransformList(transforms)
    height, width = image_size
    box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    box = transforms.apply_box(np.array([box]))[0].clip(min=0)
    annotation["bbox"] = np.minimum(box, [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS

    if "segmentation" in annotation:
        segm = annotation["segmentation"]
        if isinstance(segm, list):
            polygons = [np.asarray(p).reshape(-1, 2) for p in segm]
            segm = [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
        elif isinstance(segm, dict):
            segm = transforms.apply_segmentation(mask_util.decode(segm))
            assert segm.shape[:2] == tuple(image_size), (segm.shape, image_size)
        else:
            raise ValueError(
                f"Cannot transform segmentation of type '{type(segm)}'! Supported types are: "
                "polygons as list[list[float] or ndarray], COCO-style RLE as a dict."
            )
        annotation["segmentation"] = segm
    return annotation


def annotations_to_instances(
    annos: list[dict[str, Any]], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """Collect the annotations of one image.

    Args:
        image_size: (H, W).
        mask_format: "polygon" or "bitmask".

    Returns:
        ``gt_boxes`` (Boxes, XYXY), ``gt_classes`` (N,) int64 and, if the first annotation has a
        segmentation, ``gt_masks``: PolygonMasks or BitMasks. Without annotations there are none.

    Raises:
        ValueError: segmentations that ``mask_format`` cannot hold.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    target = Instances(image_size)
    target.gt_boxes = Boxes(np.stack(boxes) if annos else np.zeros((0, 4)))
    target.gt_classes = torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64)
    if not annos or "segmentation" not in annos[0]:
        return target

    segms = [a["segmentation"] for a in annos]
    if mask_format == "polygon":
        try:
            target.gt_masks = PolygonMasks(segms)
        except ValueError as e:
            raise ValueError(
                "Failed to use mask_format=='polygon' from the given annotations!"
            ) from e
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
    raise ValueError(
        f"Cannot convert segmentation of type '{type(segm)}' to BitMasks! Supported types are: "
        "polygons as list[list[float] or ndarray], COCO-style RLE as a dict, or a binary "
        "segmentation mask in a 2D numpy array of shape HxW."
    )


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Instances | tuple[Instances, torch.Tensor]:
    """Drop instances whose box (a side of at most ``box_threshold`` px) or mask is empty.

    With ``return_mask`` also returns which were kept, (N,) bool.
    """
    assert by_box or by_mask
    tests = []
    if by_box:
        tests.append(instances.gt_boxes.nonempty(threshold=box_threshold))
    if by_mask and instances.has("gt_masks"):
        tests.append(instances.gt_masks.nonempty())
    if not tests:
        return instances
    keep = torch.stack(tests).all(dim=0)
    return (instances[keep], keep) if return_mask else instances[keep]


def check_metadata_consistency(key: str, dataset_names: list[str]) -> None:
    """Raise ``ValueError`` if the data sets disagree on metadata ``key``, ``AttributeError`` if
    one does not have it.
    """
    entries = [getattr(MetadataCatalog.get(name), key) for name in dataset_names]
    for name, entry in zip(dataset_names, entries, strict=True):
        if entry != entries[0]:
            raise ValueError(
                f"Datasets have different metadata '{key}'! "
                f"'{dataset_names[0]}': {entries[0]}; '{name}': {entry}."
            )


def build_augmentation(cfg: Any, is_train: bool) -> list[T.Augmentation]:
    """Resize and, for training, flip, as ``cfg.INPUT`` says."""
    options = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge(options.MIN_SIZE_TEST, options.MAX_SIZE_TEST, "choice")]
    augs: list[T.Augmentation] = [
        T.ResizeShortestEdge(
            options.MIN_SIZE_TRAIN, options.MAX_SIZE_TRAIN, options.MIN_SIZE_TRAIN_SAMPLING
        )
    ]
    if options.RANDOM_FLIP != "none":
        vertical = options.RANDOM_FLIP == "vertical"
        augs.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
    return augs
