"""Quality of the run's SAM on the labeled images: IoU of its answers to clicks with the true masks.

Not part of the paper: SAM helps where it knows the images, and harms where it does not.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from s4m_d2.data.annotations import targets
from s4m_d2.data.images import photograph, read_image
from s4m_d2.data.segmentations import annotation_masks
from s4m_d2.data.splits import true_records
from s4m_d2.engine.checks.resource_checks import sam_bytes
from s4m_d2.engine.labeling.quality import quality_class_names
from s4m_d2.engine.rng import undisturbed_generators
from s4m_d2.engine.training.build import labeled_names
from s4m_d2.errors import DatasetError, Finding, attempt
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.sam.adaptation import draw_clicks
from s4m_d2.tiling import build_tiling

HELD_OUT_SHARE = 0.2  # of the labeled images
USEFUL_IOU = 0.6  # a rule of thumb: below it, SAM's masks are rarely better than the teacher's
IMAGES = 16  # labeled images, or tiles, that are measured at most
_QUICK_BYTES = 64 << 20  # of a SAM that measures them in seconds on a CPU
_MOST_CLASSES = 5  # that a line names

SIDE = 256  # px that the long side of an image counts, whatever its size
MIN_AREA = 40  # of these px
SIZE_LIMITS = (0, 16, 32, 64, SIDE + 1)
TOO_SMALL = f"no image has a mask of {MIN_AREA} px, where its longer side counts {SIDE} px"


def held_out_share(records: list[dict]) -> list[dict]:
    """A fifth of the images: the first ones, with all copies of a photograph, that leave others of
    each class."""
    photographs: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        photographs[photograph(record["file_name"])].append(record)
    left = Counter(index for copies in photographs.values() for index in _classes(copies))
    count = max(1, round(HELD_OUT_SHARE * len(records)))
    held_out: list[dict] = []
    for copies in photographs.values():
        if len(held_out) < count and all(left[index] > 1 for index in _classes(copies)):
            held_out += copies
            left.subtract(_classes(copies))
    return held_out or records[:count]


def _classes(records: Sequence[dict]) -> set[int]:
    return {annotation["category_id"] for record in records for annotation in targets(record)}


def split_labeled(cfg: CfgNode) -> tuple[list[dict], list[dict]]:
    """Records, without crowds, of labeled images with instances: those to adapt SAM on, and a fifth
    that is held out, the gate's if it has one."""
    records = true_records(labeled_names(cfg))
    names = {record["file_name"] for record in held_out_share(records)}
    parts: tuple[list[dict], list[dict]] = ([], [])
    for record in records:
        if annotations := targets(record):
            parts[record["file_name"] in names].append({**record, "annotations": annotations})
    return parts


@dataclass(frozen=True)
class SamQuality:
    """SAM's answers to the clicks in N masks; (N,) arrays."""

    categories: np.ndarray  #: class indices
    sides: np.ndarray  #: of a square of the mask's area, px of an image whose long side counts 256
    rated: np.ndarray  #: IoU of the best-rated of the three answers
    best: np.ndarray  #: IoU of the truly best one

    def groups(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of all masks, of each size, of each class: "name", number of "masks", mean "iou" and
        "best_iou"."""
        groups = [("all", np.ones(len(self.sides), dtype=bool))]
        for low, high in zip(SIZE_LIMITS, SIZE_LIMITS[1:], strict=False):
            name = f"{low} to {high} px" if high <= SIDE else f"{low} px and more"
            groups.append((name, (self.sides >= low) & (self.sides < high)))
        groups += [(name, self.categories == key) for key, name in enumerate(names)]
        return [
            {
                "name": name,
                "masks": int(chosen.sum()),
                "iou": float(self.rated[chosen].mean()),
                "best_iou": float(self.best[chosen].mean()),
            }
            for name, chosen in groups
            if chosen.any()
        ]


@torch.no_grad()
def measure_sam(
    backend: SamBackend, records: Iterable[dict], *, clicks: int, crop: int = 0, seed: int = 0
) -> SamQuality:
    """Ask for the masks of Detectron2's records of images or tiles, crowds left out.

    A mask is asked for as refinement asks for a teacher's that is right, and everywhere equally
    certain: with clicks drawn uniformly inside it, without replacement. Masks of less than MIN_AREA
    px, in an image whose long side counts SIDE, are left out.

    Args:
        crop: side of a window at the center, px, that stands for the image; 0: all of it.
        seed: of the clicks, which depend on it and the position of the record.

    Raises:
        DatasetError: there is no mask of that size, or an image cannot be read.
    """
    found = []
    for number, record in enumerate(records):
        image, masks, categories = read_window(record, crop)
        sides = np.sqrt(masks.sum(axis=(1, 2))) * SIDE / max(masks.shape[1:])
        chosen = sides**2 >= MIN_AREA
        if not chosen.any():
            continue
        masks = masks[chosen]
        rng = np.random.default_rng([seed, number])
        points = torch.from_numpy(np.stack([draw_clicks(mask, clicks, rng) for mask in masks]))
        frame = torch.tensor(image).permute(2, 0, 1)[None]
        encoded = backend.encode(frame.to(backend.device), [image.shape[:2]])
        (output,) = backend.prompt(encoded, [points.to(backend.device)])
        pairs = zip(output.mask_logits, masks, strict=True)
        ious = torch.stack([_ious(backend, *pair) for pair in pairs])
        rated = ious.gather(1, output.iou_predictions.cpu().argmax(dim=1, keepdim=True))[:, 0]
        found.append((categories[chosen], sides[chosen], rated, ious.amax(dim=1)))
    if not found:
        raise DatasetError(TOO_SMALL)
    return SamQuality(*(np.concatenate(values) for values in zip(*found, strict=True)))


def read_window(
    record: dict, crop: int = 0, side: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (h, w, 3) RGB, masks (N, h, w) and class indices (N,) of a tile or the image's center.

    crop: see :func:`measure_sam`. side: px, to which the longer side is resized; 0: it is not.
    """
    image = read_image(record["file_name"], "RGB")
    size = image.shape[:2]
    left, top, right, bottom = record.get("tile", (0, 0, size[1], size[0]))
    height, width = (min(crop or side, side) for side in (bottom - top, right - left))
    left, top = (left + right - width) // 2, (top + bottom - height) // 2
    scale = side / max(height, width) if side else 1.0
    shape = max(round(scale * height), 1), max(round(scale * width), 1)
    window = T.TransformList(
        [T.CropTransform(left, top, width, height), T.ResizeTransform(height, width, *shape)]
    )
    annotations = targets(record)
    masks = annotation_masks(record["file_name"], annotations, window, size, shape)
    categories = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    return window.apply_image(image), masks.numpy(), categories


def _ious(backend: SamBackend, logits: Tensor, truth: np.ndarray) -> Tensor:
    """(3,) IoUs of a mask's answers, compared at the window's resolution."""
    mask, (height, width) = torch.from_numpy(truth), truth.shape
    answers = (backend.upscale(logits, (height, width)) > 0).cpu()
    return (answers & mask).sum(dim=(1, 2)) / (answers | mask).sum(dim=(1, 2))


def labeled_quality(cfg: CfgNode) -> dict[str, Any]:
    """Measure the SAM of S4M.SAM on IMAGES labeled images, or tiles, that it did not learn from.

    Returns, for JSON, "images" measured, or tiles; "clicks" in a mask; "iou"; "groups"
    (:meth:`SamQuality.groups`); "text". S4MError: data or SAM cannot be read, or no mask is large
    enough.
    """
    classes = quality_class_names(cfg, labeled_names(cfg))
    trained, held_out = split_labeled(cfg)
    unseen = held_out if cfg.S4M.SAM.ADAPT else trained + held_out
    records = build_tiling(cfg).records(unseen, filter_empty=True)
    chosen = np.random.default_rng(cfg.SEED).permutation(len(records))[:IMAGES]
    clicks = cfg.S4M.REFINE.NUM_POINTS
    with undisturbed_generators():
        backend = build_sam_backend(cfg)
        answers = measure_sam(backend, [records[i] for i in chosen], clicks=clicks, seed=cfg.SEED)
    groups = answers.groups(classes)
    named = [g for g in groups[1:] if len(classes) <= _MOST_CLASSES or g["name"] not in classes]
    parts = ", ".join(f"{group['name']} {group['iou']:.2f}" for group in named)
    images, iou, masks = len(chosen), groups[0]["iou"], groups[0]["masks"]
    where = f"{images} labeled {'tiles' if cfg.INPUT.TILE.SIZE else 'images'}"
    text = f"IoU {iou:.2f} of {masks} masks in {where}, {clicks} clicks each ({parts}); below "
    text += f"{USEFUL_IOU} refinement rarely helps"
    return {"images": images, "clicks": clicks, "iou": iou, "groups": groups, "text": text}


def sam_findings(cfg: CfgNode, sam: SamBackend | None) -> list[Finding]:
    """A line of ``--check``, measured where that takes seconds; ``sam`` has no values."""
    if sam is None:
        return []
    item = "SAM's masks"
    if not cfg.MODEL.DEVICE.startswith("cuda") and sam_bytes(sam) > _QUICK_BYTES:
        return [Finding(item, "not measured: minutes on a CPU; tools/sam_eval.py does it")]
    found, errors = attempt(labeled_quality, cfg)
    if found is None:
        return [Finding(item, "not measured", (), [str(errors[0])])]
    return [Finding(item, found["text"] + "; before adaptation" * bool(cfg.S4M.SAM.ADAPT))]
