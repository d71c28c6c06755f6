#!/usr/bin/env python
"""Measure a SAM on labeled images: IoU of its masks for prompt points with the labels.

    python tools/sam_eval.py --labeled val.json --images val --clicks 3 --crop 256

SAM is prompted with points drawn uniformly inside each mask of at least 40 px (if the image's
longer side is scaled to 256 px). As in S4M, the mask with the highest predicted IoU of three is
used; "best" is the one with the highest true IoU. Sizes are the side of a square of the mask's
area, in the same px.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from tabulate import tabulate
from tiny_sam_data import SIDE, load_records
from tqdm import tqdm

from s4m_d2.config import add_s4m_config
from s4m_d2.data.images import read_image
from s4m_d2.data.segmentations import transform_masks
from s4m_d2.errors import DatasetError, InputError, S4MError
from s4m_d2.sam import SAM_BACKEND_REGISTRY, SamBackend, build_sam_backend

MIN_AREA = 40  # px
SIZE_LIMITS = (0, 16, 32, 64, SIDE + 1)  # px


@dataclass
class Answers:
    """Of each mask: class index, side in px, IoU of the best-rated answer and of the best one."""

    categories: np.ndarray
    sides: np.ndarray
    rated: np.ndarray
    best: np.ndarray

    def row(self, name: str, chosen: np.ndarray) -> list:
        return [name, int(chosen.sum()), self.rated[chosen].mean(), self.best[chosen].mean()]

    def rows(self, names: list[str]) -> list[list]:
        """Name, count and mean IoUs of all masks, of each size, of each class."""
        groups = [("all", np.ones(len(self.sides), dtype=bool))]
        for low, high in zip(SIZE_LIMITS, SIZE_LIMITS[1:], strict=False):
            name = f"{low} to {high} px" if high <= SIDE else f"{low} px and more"
            groups.append((name, (self.sides >= low) & (self.sides < high)))
        groups += [(name, self.categories == key) for key, name in enumerate(names)]
        return [self.row(name, chosen) for name, chosen in groups if chosen.any()]


@torch.no_grad()
def measure(
    backend: SamBackend, records: list[dict], *, clicks: int, crop: int = 0, seed: int = 0
) -> Answers:
    """Ask for the masks of Detectron2's records, in a window of ``crop`` px at the center.

    crop: 0 for whole images. The clicks depend on the seed and the position of the record.

    Raises:
        InputError: ``clicks`` or ``crop`` is out of range.
        DatasetError: there is no mask of that size.
    """
    if clicks < 1 or crop < 0:
        raise InputError(
            f"{clicks} clicks, a crop of {crop} px; expected at least 1, and 0 or more"
        )
    found = []
    for number, record in enumerate(tqdm(records, disable=None)):
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
            [_iou(backend, output.mask_logits[:, k], masks) for k in range(3)], dim=1
        )
        rated = ious.gather(1, output.iou_predictions.cpu().argmax(dim=1, keepdim=True))[:, 0]
        found.append((categories[chosen], sides[chosen], rated, ious.amax(dim=1)))
    if not found:
        raise DatasetError(f"no image has a mask of at least {MIN_AREA} px; give other images")
    return Answers(*(np.concatenate(values) for values in zip(*found, strict=True)))


def _window(record: dict, crop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (h, w, 3), masks (N, h, w) and class indices (N,) at the center of an image."""
    image = read_image(record["file_name"], "RGB")
    size = image.shape[:2]
    height, width = (min(crop, side) if crop else side for side in size)
    window = T.CropTransform((size[1] - width) // 2, (size[0] - height) // 2, width, height)
    annotations = record["annotations"]
    masks = transform_masks(
        [a["segmentation"] for a in annotations], T.TransformList([window]), size, (height, width)
    )
    categories = np.array([a["category_id"] for a in annotations])
    return window.apply_image(image), masks.numpy(), categories


def _clicks(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) float32 centers of pixels (x, y), in [0, 1] over the window."""
    places = np.argwhere(mask)
    chosen = places[rng.integers(len(places), size=count)]
    return ((chosen + 0.5) / mask.shape)[:, ::-1].astype(np.float32)


def _iou(backend: SamBackend, logits: torch.Tensor, masks: np.ndarray) -> torch.Tensor:
    """(N,) at the window's resolution."""
    answers = (backend.upscale(logits, masks.shape[1:]) > 0).cpu()
    truth = torch.from_numpy(masks)
    union = (answers | truth).sum(dim=(1, 2))
    return (answers & truth).sum(dim=(1, 2)) / union


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labeled", required=True, metavar="JSON", help="COCO annotations")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--held-out", action="store_true",
                        help="only the fifth that tools/train_tiny_sam.py leaves out")  # fmt: skip
    parser.add_argument("--clicks", type=int, default=3, help="per mask (default: 3)")
    parser.add_argument("--crop", type=int, default=0, help="px; 0, the default: whole images")
    parser.add_argument("--seed", type=int, default=0, help="of the clicks")
    backends = sorted(key for key, _ in SAM_BACKEND_REGISTRY)
    parser.add_argument("--sam", choices=backends, default="tiny", help="default: tiny")
    parser.add_argument("--sam-type", default="", metavar="T", help="vit_b ... hiera_l")
    parser.add_argument("--sam-checkpoint", default="", metavar="FILE")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    cfg = get_cfg()
    add_s4m_config(cfg)
    sam = cfg.S4M.SAM
    sam.BACKEND, sam.MODEL_TYPE, sam.CHECKPOINT = args.sam, args.sam_type, args.sam_checkpoint
    cfg.MODEL.DEVICE = args.device
    try:
        classes, trained, held_out = load_records(args.labeled, args.images)
        records = held_out if args.held_out else [*trained, *held_out]
        answers = measure(
            build_sam_backend(cfg), records, clicks=args.clicks, crop=args.crop, seed=args.seed
        )
    except S4MError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"{len(records)} images, {args.clicks} clicks per mask, seed {args.seed}:")
    print(tabulate(answers.rows(classes), ["", "masks", "IoU", "best"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
