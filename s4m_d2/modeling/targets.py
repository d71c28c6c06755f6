"""Training targets: checked, and padded to the size of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.transfers import to_device


def prepare_targets(
    batched_inputs: Sequence[Mapping[str, Any]],
    *,
    padded_size: tuple[int, int],
    num_classes: int,
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """Make the criterion's targets of a batch.

    Args:
        batched_inputs: samples with "instances": ``gt_classes`` (N,) and ``gt_masks`` (BitMasks or
            an (N, H, W) tensor at the image's size; may be missing if N is 0), and optionally
            ``gt_weights`` (N,) and ``gt_doubts`` (N, H, W), see the criterion.
        padded_size: (H, W) of the padded batch.
        num_classes: valid class ids are 0 .. num_classes - 1.

    Returns:
        for each image ``labels`` (N,) int64, ``masks`` (N, *padded_size) bool and, if given,
        ``weights`` (N,) and ``doubts`` (N, *padded_size).

    Raises:
        InputError: if instances are missing or their masks have another type.
        DatasetError: if a class id is out of range, or sizes or numbers disagree; it names the
            file. Ids on a GPU are checked by the matcher, which avoids a synchronization here.
    """
    return [_target(sample, padded_size, num_classes, device) for sample in batched_inputs]


def _target(
    sample: Mapping[str, Any], size: tuple[int, int], num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    name = str(sample.get("file_name", sample.get("image_id", "<unnamed image>")))
    if "instances" not in sample:
        raise InputError(
            f"{name}: a training sample needs 'instances'; use a mapper for labeled images "
            "(INPUT.DATASET_MAPPER_NAME)"
        )
    instances = sample["instances"]
    labels = instances.gt_classes.to(torch.int64)
    bad = (labels < 0) | (labels >= num_classes)
    if labels.device.type == "cpu" and bad.any():
        raise DatasetError(
            f"{name}: class id {int(labels[bad][0])} is out of range 0..{num_classes - 1}; check "
            "the annotations' categories and MODEL.SEM_SEG_HEAD.NUM_CLASSES"
        )
    masks = _masks(instances, tuple(sample["image"].shape[-2:]), name)
    target = {"labels": to_device(labels, device), "masks": _pad(to_device(masks, device), size)}
    if instances.has("gt_weights"):
        target["weights"] = to_device(instances.gt_weights, device)
    if instances.has("gt_doubts"):
        target["doubts"] = _pad(to_device(instances.gt_doubts, device), size)
    return target


def _masks(instances: Instances, size: tuple[int, ...], name: str) -> Tensor:
    if not instances.has("gt_masks") and not len(instances):
        return torch.zeros((0, *size), dtype=torch.bool)
    masks = instances.gt_masks if instances.has("gt_masks") else None
    masks = masks.tensor if isinstance(masks, BitMasks) else masks
    if not isinstance(masks, Tensor):
        raise InputError(
            f"{name}: gt_masks must be BitMasks or a tensor, got {type(masks).__name__}; set "
            "MODEL.MASK_ON to True and INPUT.MASK_FORMAT to 'bitmask'"
        )
    if tuple(masks.shape) != (len(instances), *size):
        raise DatasetError(
            f"{name}: masks {tuple(masks.shape)} do not fit {len(instances)} instances on an image "
            f"of {size}; the annotation belongs to another image or size"
        )
    return masks.bool()


def _pad(masks: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = masks.shape[-2:]
    return F.pad(masks, (0, size[1] - width, 0, size[0] - height))
