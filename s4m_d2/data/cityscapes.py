"""Data sets in Cityscapes' layout: images in one folder per city, instance ids in PNG files."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from cityscapesscripts.helpers.labels import id2label, labels
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import ImageOps

from s4m_d2.data.images import dataset_path, image_size, list_images, open_image
from s4m_d2.errors import DatasetError
from s4m_d2.structures import encode_edges

IMAGE_SUFFIX = "_leftImg8bit.png"
INSTANCE_SUFFIX = "_gtFine_instanceIds.png"

_THINGS = [label for label in labels if label.hasInstances and not label.ignoreInEval]
_CONTIGUOUS = {label.id: index for index, label in enumerate(_THINGS)}
_IDS_PER_CLASS = 1000  # instance id = class id * 1000 + number; a group has the class id alone


@dataclass(frozen=True)
class CityscapesFormat:
    """A data set with ``image_dir/CITY/*_leftImg8bit.png`` and ``gt_dir/CITY/*_instanceIds.png``.

    These are the folders of one split; relative ones start at $DETECTRON2_DATASETS.
    """

    image_dir: str
    gt_dir: str
    #: End of the message if the data set is missing.
    remedy: str = "Set DETECTRON2_DATASETS to the folder that holds it."

    def metadata(self) -> dict:
        """Metadata for Detectron2's evaluators and visualizer, with the current paths."""
        return {
            "thing_classes": [label.name for label in _THINGS],
            "thing_colors": [list(label.color) for label in _THINGS],
            "thing_dataset_id_to_contiguous_id": dict(_CONTIGUOUS),
            "evaluator_type": "cityscapes_instance",
            "image_dir": dataset_path(self.image_dir),
            "gt_dir": dataset_path(self.gt_dir),
        }

    def unlabeled_images(self) -> list[str]:
        """Paths of all images, sorted."""
        return list_images(dataset_path(self.image_dir), (IMAGE_SUFFIX,), self.remedy)

    def load(self, choose: Callable[[Sequence[str]], list[str]]) -> tuple[list[dict], dict]:
        """Read the images that ``choose`` picks from the paths of all: Detectron2 records, with
        compressed RLEs and boxes XYXY in px, and the metadata.

        Raises:
            DatasetError: an image has no instance ids, sizes differ, or an id has no class.
        """
        images = choose(self.unlabeled_images())
        image_dir, gt_dir = dataset_path(self.image_dir), dataset_path(self.gt_dir)
        if not os.path.isdir(gt_dir):
            raise DatasetError(f"The folder of annotations {gt_dir} does not exist. {self.remedy}")
        stems = [os.path.relpath(i, image_dir).removesuffix(IMAGE_SUFFIX) for i in images]
        ids = [os.path.join(gt_dir, stem + INSTANCE_SUFFIX) for stem in stems]
        cpus = (os.cpu_count() or 1) // comm.get_local_size()
        with ThreadPoolExecutor(max(1, min(cpus, 8))) as pool:  # decoding releases Python's lock
            return list(pool.map(_read_record, images, ids)), self.metadata()


def _read_record(image_file: str, instance_file: str) -> dict:
    """Read one image's record. As in Detectron2, an id below 1000 is a group (``iscrowd``), and
    instances only one pixel wide or high are omitted."""
    with open_image(instance_file) as image:
        mode = image.mode
        ids = np.asarray(ImageOps.exif_transpose(image))  # (H, W), rotated as the image
    if not mode.startswith("I"):  # Pillow's modes of integers with more than 8 bits
        raise DatasetError(
            f"{instance_file} must have one channel of integer ids with at least 16 bits, got "
            f"mode {mode}: 8 bits cannot tell instances apart. Recreate it with createInstanceImgs."
        )
    height, width = size = image_size(image_file)
    if ids.shape != size:
        raise DatasetError(
            f"{instance_file} has (height, width) {ids.shape}, but its image {image_file} has "
            f"{size}. Replace the one that does not belong to the data set."
        )
    return {
        "file_name": image_file,
        "image_id": os.path.basename(image_file),
        "height": height,
        "width": width,
        "annotations": _annotations(ids, instance_file),
    }


def _annotations(ids: np.ndarray, instance_file: str) -> list[dict]:
    """All instances of an (H, W) id map, from one pass over its runs in column order."""
    flat = ids.T.reshape(-1).astype(np.int64)
    starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
    ends = np.append(starts[1:], flat.size)
    run_ids = flat[starts]
    annotations = []
    for instance_id in np.unique(run_ids):
        is_group = instance_id < _IDS_PER_CLASS
        label_id = int(instance_id if is_group else instance_id // _IDS_PER_CLASS)
        if label_id not in id2label:
            raise DatasetError(
                f"{instance_file} contains the id {instance_id}, but Cityscapes has no class "
                f"{label_id}. Recreate the file with createInstanceImgs."
            )
        if label_id not in _CONTIGUOUS:
            continue
        runs = run_ids == instance_id
        rle = encode_edges(np.stack((starts[runs], ends[runs]), axis=1).reshape(-1), ids.shape)
        x, y, box_width, box_height = mask_util.toBbox(rle).tolist()
        if min(box_width, box_height) <= 1:
            continue
        annotations.append(
            {
                "iscrowd": int(is_group),
                "category_id": _CONTIGUOUS[label_id],
                "bbox": [x, y, x + box_width, y + box_height],
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": rle,
            }
        )
    return annotations
