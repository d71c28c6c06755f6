"""Pseudo-labels, measures of masks, run-length encoded masks, and a sample's generators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from torch import Tensor

from s4m_d2.errors import InputError
from s4m_d2.transfers import to_device, to_host

MAX_BYTE = 255
# Values of masks that are converted to float at once: sums of so many pixels are exact in float32
# (up to 2 ** 24).
CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class PseudoLabels:
    """Instances predicted by the teacher on one image; InputError if shapes or dtypes disagree."""

    labels: Tensor  #: (N,) int64, contiguous class ids
    masks: Tensor  #: (N, H, W) bool, in the frame of the image or of a prediction
    scores: Tensor  #: (N,) float, class probabilities in [0, 1]
    areas: np.ndarray | None = None  #: (N,) px of the masks; None: not fetched to the host yet
    #: (N,) float, SAM's prediction of its mask's IoU, nan: another's mask; None: without SAM
    sam_ious: Tensor | None = None
    #: (N,) float in [0, 1], of the masks (:mod:`s4m_d2.semi.filters`); None: not measured
    quality: Tensor | None = None
    #: (N, H, W) uint8; in the masks' cross-entropy a pixel weighs 1 - doubt / 255; None: 1
    doubts: Tensor | None = None

    def __post_init__(self) -> None:
        parts = self.labels, self.masks, self.scores
        dtypes_fit = self.labels.dtype == torch.int64 and self.masks.dtype == torch.bool
        shapes_fit = [part.ndim for part in parts] == [1, 3, 1] and len({*map(len, parts)}) == 1
        if not (dtypes_fit and self.scores.is_floating_point() and shapes_fit):
            found = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts)
            expected = "labels (N,) int64, masks (N, H, W) bool, scores (N,) floating point"
            raise InputError(f"pseudo-labels are {found}; expected {expected}")

    @classmethod
    def empty(cls, image_size: tuple[int, int], device: torch.device | str = "cpu") -> PseudoLabels:
        """Make no instances, for an image of ``image_size`` (H, W)."""
        labels = torch.zeros(0, dtype=torch.int64, device=device)
        masks = torch.zeros((0, *image_size), dtype=torch.bool, device=device)
        return cls(labels, masks, torch.zeros(0, device=device), np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray | slice) -> PseudoLabels:
        """Keep the instances in these rows: a slice, or a non-empty array of indices."""
        index = rows if isinstance(rows, slice) else to_device(rows, self.masks.device)
        tensors = {k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, areas=None if self.areas is None else self.areas[rows], **tensors)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the masks' frame."""
        return self.masks.shape[1], self.masks.shape[2]

    def with_masks(self, masks: Tensor) -> PseudoLabels:
        """Replace the masks by others, (N, H', W') bool, that are not SAM's."""
        return replace(self, masks=masks, areas=None, sam_ious=None, quality=None, doubts=None)

    def to_instances(self, *, weighted: bool = False) -> Instances:
        """Convert to Instances with gt_classes, gt_masks, gt_boxes, with gt_doubts if there are any
        and, if ``weighted``, with gt_weights, the quality."""
        weights = {"gt_weights": self.quality if weighted else None, "gt_doubts": self.doubts}
        return Instances(
            self.image_size,
            gt_classes=self.labels,
            gt_masks=BitMasks(self.masks),
            gt_boxes=Boxes(mask_boxes(self.masks)),
            **{name: values for name, values in weights.items() if values is not None},
        )


def known_areas(labels: Sequence[PseudoLabels]) -> list[np.ndarray]:
    """(N,) areas in px of the masks of each image. Synchronizes once, unless all are known."""
    unknown = [label.masks for label in labels if label.areas is None]
    fetched = iter(to_host(*map(mask_areas, unknown)) if unknown else ())
    return [next(fetched) if label.areas is None else label.areas for label in labels]


def drop_empty(labels: Sequence[PseudoLabels]) -> list[PseudoLabels]:
    """Drop empty masks of a batch, and set ``areas``; synchronizes as :func:`known_areas`."""
    pairs = zip(labels, known_areas(labels), strict=True)
    known = [(replace(label, areas=areas), areas) for label, areas in pairs]
    return [k if areas.all() else k[np.flatnonzero(areas)] for k, areas in known]


def mask_areas(masks: Tensor) -> Tensor:
    """(N,) int64: number of pixels of each of (N, H, W) bool masks."""
    # Columns are summed as bytes, in bands of at most 255 rows, which is fast.
    bands = masks.view(torch.uint8).split(MAX_BYTE, dim=1)
    return torch.stack([band.sum(dim=1, dtype=torch.uint8).sum(dim=1) for band in bands]).sum(dim=0)


def dense_overlaps(masks: Tensor, segments: Tensor) -> Tensor:
    """(N, K) int64: the pixels that each of (N, H, W) bool masks shares with each of (K, H, W) bool
    segments, which may overlap."""
    masks, segments = masks.flatten(1), segments.flatten(1)
    counts = torch.zeros(len(masks), len(segments), dtype=torch.int64, device=masks.device)
    if not counts.numel():
        return counts
    pixels = max(1, CHUNK_VALUES // (len(masks) + len(segments)))
    with torch.autocast(masks.device.type, enabled=False):
        for part, of_segments in zip(
            masks.split(pixels, dim=1), segments.split(pixels, dim=1), strict=True
        ):
            counts += (part.float() @ of_segments.float().T).long()
    return counts


def mask_boxes(masks: Tensor) -> Tensor:
    """(N, 4) float32 boxes (x0, y0, x1, y1) in px of (N, H, W) bool masks, on their device.

    As ``BitMasks.get_bounding_boxes``: the last pixel is included, and of no pixel it is zero.
    """
    starts, ends = [], []
    for dim in (1, 2):  # along y, which leaves x; along x
        profile = masks.view(torch.uint8).amax(dim=dim)
        starts.append(profile.argmax(dim=1))
        ends.append(profile.shape[1] - profile.flip(1).argmax(dim=1))
    boxes = torch.stack(starts + ends, dim=1)
    return torch.where(profile.amax(dim=1, keepdim=True) > 0, boxes, 0).float()


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """COCO's run-length encoding of (N, H, W) bool masks: N dicts of "size", "counts" (bytes)."""
    by_column = masks.transpose(1, 2).contiguous().cpu().numpy().view(np.uint8)
    return [mask_util.encode(mask.T) for mask in by_column]


def plain_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an RLE for JSON: the counts as str."""
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def encode_edges(edges: Sequence[int] | np.ndarray, image_size: tuple[int, int]) -> dict[str, Any]:
    """COCO's RLE of an (H, W) mask from the pixels at which its runs start and end, alternately:
    increasing pixel numbers in column-major order."""
    counts = np.diff(edges, prepend=0, append=image_size[0] * image_size[1]).tolist()
    if not counts[-1]:
        del counts[-1]  # COCO's encoding has no empty run but the first
    size = [int(side) for side in image_size]
    return mask_util.frPyObjects({"size": size, "counts": counts}, *size)


def decode_window(rle: Mapping[str, Any]) -> tuple[np.ndarray, int, int]:
    """Decode the part of a mask inside its box: (h, w) uint8, and the box's x and y."""
    x, y, width, height = mask_util.toBbox(rle).astype(int).tolist()
    return mask_util.decode(rle)[y : y + height, x : x + width], x, y


def as_rles(masks: RLEMasks | Tensor) -> Sequence[Mapping[str, Any]]:
    """RLEs of N masks, which are RLEMasks or (N, H, W) bool."""
    return masks.rles if isinstance(masks, RLEMasks) else encode_masks(masks)


class RLEMasks:
    """N run-length encoded masks of one image, in the place of the (N, H, W) bool ``pred_masks``.

    ``rles`` are COCO's (:func:`encode_masks`). Iteration, and indexing with an int, decode (H, W)
    bool tensors on the CPU. Any other index returns RLEMasks. ``np.asarray`` decodes all masks.
    """

    def __init__(self, rles: Sequence[Mapping[str, Any]], image_size: tuple[int, int]) -> None:
        self.rles = list(rles)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[Tensor]:
        return (_decode(rle) for rle in self.rles)

    def __getitem__(self, item: int | slice | Sequence[int] | Tensor) -> Tensor | RLEMasks:
        if isinstance(item, Tensor):
            item = item.cpu()
        chosen = torch.arange(len(self))[item].tolist()
        if isinstance(chosen, int):
            return _decode(self.rles[chosen])
        return RLEMasks([self.rles[index] for index in chosen], self.image_size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        masks = np.zeros((len(self), *self.image_size), dtype=bool)
        for decoded, mask in zip(masks, self, strict=True):
            decoded[:] = mask.numpy()
        return masks if dtype is None else masks.astype(dtype, copy=False)

    def to(self, *args: Any, **kwargs: Any) -> RLEMasks:
        """Return self: encoded masks are on the CPU."""
        return self

    @staticmethod
    def cat(parts: Sequence[RLEMasks]) -> RLEMasks:
        """Join masks of one size, as ``Instances.cat`` does."""
        return RLEMasks([rle for part in parts for rle in part.rles], parts[0].image_size)


def _decode(rle: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(mask_util.decode(rle).view(bool))


def sample_generators(
    batched_inputs: Sequence[Mapping[str, Any]], purpose: str, device: torch.device | str
) -> list[torch.Generator] | None:
    """One generator per sample, seeded with ``sample["seeds"][purpose]``; None: without seeds."""
    if not all("seeds" in sample for sample in batched_inputs):
        return None
    seeds = [sample["seeds"][purpose] for sample in batched_inputs]
    return [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
