"""How well a SAM segments labeled images: the IoU of its answers to clicks with the true masks.

Not part of the paper: SAM helps where it knows the images, and harms where it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import transforms as T
from torch import Tensor

from s4m_d2.data.images import read_image
from s4m_d2.data.segmentations import transform_masks
from s4m_d2.errors import DatasetError, InputError
from s4m_d2.sam import SamBackend

SIDE = 256  # px that the long side of an image counts, whatever its size
MIN_AREA = 40  # of these px
SIZE_LIMITS = (0, 16, 32, 64, SIDE + 1)


@dataclass(frozen=True)
class SamQuality:
    """Of each mask: class index, side of a square of its area in px of an image whose long side
    counts 256, IoU of the best-rated of SAM's answers, and of the truly best one. (N,) each."""

    categories: np.ndarray
    sides: np.ndarray
    rated: np.ndarray
    best: np.ndarray

    def rows(self, names: Sequence[str]) -> list[list]:
        """Name, number of masks and mean IoUs of all masks, of each size, of each class."""
        groups = [("all", np.ones(len(self.sides), dtype=bool))]
        for low, high in zip(SIZE_LIMITS, SIZE_LIMITS[1:], strict=False):
            name = f"{low} to {high} px" if high <= SIDE else f"{low} px and more"
            groups.append((name, (self.sides >= low) & (self.sides < high)))
        groups += [(name, self.categories == key) for key, name in enumerate(names)]
        return [
            [name, int(chosen.sum()), float(self.rated[chosen].mean()), self.best[chosen].mean()]
            for name, chosen in groups
            if chosen.any()
        ]


@torch.no_grad()
def measure_sam(
    backend: SamBackend, records: Iterable[dict], *, clicks: int, crop: int = 0, seed: int = 0
) -> SamQuality:
    """Ask for the masks of Detectron2's records of images or tiles, crowds left out.

    A mask is asked for as refinement asks for a teacher's that is right, and everywhere equally
    certain: with clicks drawn uniformly inside it, without replacement. The best-rated of three
    masks answers. Masks of less than 40 px, in an image whose long side counts 256, are left out.

    Args:
        crop: side of a window at the center, px, that stands for the image; 0: all of it.
        seed: of the clicks, which depend on it and the position of the record.

    Raises:
        InputError: ``clicks`` or ``crop`` is out of range.
        DatasetError: there is no mask of that size, or an image cannot be read.
    """
    if clicks < 1 or crop < 0:
        raise InputError(
            f"{clicks} clicks, a crop of {crop} px; expected at least 1, and 0 or more"
        )
    found = []
    for number, record in enumerate(records):
        image, masks, categories = _window(record, crop)
        sides = np.sqrt(masks.sum(axis=(1, 2))) * SIDE / max(masks.shape[1:])
        chosen = sides**2 >= MIN_AREA
        if not chosen.any():
            continue
        masks = masks[chosen]
        rng = np.random.default_rng([seed, number])
        points = torch.from_numpy(np.stack([_clicks(mask, clicks, rng) for mask in masks]))
        frame = torch.tensor(image).permute(2, 0, 1)[None]
        encoded = backend.encode(frame.to(backend.device), [image.shape[:2]])
        (output,) = backend.prompt(encoded, [points.to(backend.device)])
        ious = torch.stack(
            [
                _ious(backend, logits, torch.from_numpy(mask))
                for logits, mask in zip(output.mask_logits, masks, strict=True)
            ]
        )
        rated = ious.gather(1, output.iou_predictions.cpu().argmax(dim=1, keepdim=True))[:, 0]
        found.append((categories[chosen], sides[chosen], rated, ious.amax(dim=1)))
    if not found:
        raise DatasetError(f"no image has a mask of at least {MIN_AREA} px; give other images")
    return SamQuality(*(np.concatenate(values) for values in zip(*found, strict=True)))


def _window(record: dict, crop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (h, w, 3), masks (N, h, w) and class indices (N,) of a tile or the image's center."""
    image = read_image(record["file_name"], "RGB")
    size = image.shape[:2]
    left, top, right, bottom = record.get("tile", (0, 0, size[1], size[0]))
    height, width = (min(crop or side, side) for side in (bottom - top, right - left))
    left, top = (left + right - width) // 2, (top + bottom - height) // 2
    window = T.CropTransform(left, top, width, height)
    annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    masks = transform_masks(
        [a["segmentation"] for a in annotations], T.TransformList([window]), size, (height, width)
    )
    categories = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    return window.apply_image(image), masks.numpy(), categories


def _clicks(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) float32 centers of pixels (x, y), in [0, 1] over the window."""
    places = np.argwhere(mask)
    chosen = places[rng.choice(len(places), size=count, replace=len(places) < count)]
    return ((chosen + 0.5) / mask.shape)[:, ::-1].astype(np.float32)


def _ious(backend: SamBackend, logits: Tensor, mask: Tensor) -> Tensor:
    """(3,) IoUs of a mask's answers, compared at the window's resolution."""
    answers = (backend.upscale(logits, tuple(mask.shape)) > 0).cpu()
    return (answers & mask).sum(dim=(1, 2)) / (answers | mask).sum(dim=(1, 2))
