"""Fine-tuning of the run's SAM on its labeled images (S4M.SAM.ADAPT), kept where it helps.

Not part of the paper.
"""

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from s4m_d2.engine.labeling.sam_quality import (
    MIN_AREA,
    SIDE,
    TOO_SMALL,
    measure_sam,
    read_window,
    split_labeled,
)
from s4m_d2.engine.rng import derive_seed, undisturbed_generators
from s4m_d2.engine.stages import STAGES, needs_sam
from s4m_d2.engine.training.stop_signals import interruptible, stop_if_asked
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write
from s4m_d2.report import read_results, write_results
from s4m_d2.report.run import CONFIG
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.adaptation import View, adapt_sam
from s4m_d2.sam.point_prompts import PointPromptBackend
from s4m_d2.tiling import Box, build_tiling, cut_record

logger = logging.getLogger(__name__)

ADAPTED, WEIGHTS = "sam_adapted.json", "sam_adapted"  # in the folder of the run
BATCH, MASKS_DRAWN = 4, 24  # of SAM's fine-tuning
WHOLE_CHANCE, MOST_TILES, MOST_TRIES = 0.4, 4, 1000  # of a view


def adapted_config(cfg: CfgNode, *, resume: bool) -> CfgNode:
    """The config of a run, with its SAM fine-tuned if S4M.SAM.ADAPT says so and that helps.

    The weights are kept, as OUTPUT_DIR/sam_adapted.pth (transformers: a folder sam_adapted), if
    they segment held-out labeled images better. A continued run takes what it had decided.
    """
    if not cfg.S4M.SAM.ADAPT or not any(needs_sam(cfg, stage) for stage in STAGES):
        return cfg
    path = os.path.join(cfg.OUTPUT_DIR, ADAPTED)
    stop_if_asked()
    if comm.is_main_process() and not (resume and os.path.isfile(path)):
        with interruptible(), undisturbed_generators():
            decision = _adapt(cfg)
            logger.info("SAM's adaptation: %s.", decision["text"])
            write_results(decision, path)
    stop_if_asked()
    decision = read_results(path)
    if not decision["kept"]:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.S4M.SAM.CHECKPOINT = os.path.join(cfg.OUTPUT_DIR, decision["weights"])
    cfg.freeze()
    if comm.is_main_process():
        with atomic_write(os.path.join(cfg.OUTPUT_DIR, CONFIG), "w") as file:
            file.write(cfg.dump())  # whoever reads it takes the same SAM
    return cfg


def _adapt(cfg: CfgNode) -> dict:
    trained, held_out = split_labeled(cfg)
    if not trained or not held_out:
        return {"kept": False, "text": "left out: it needs two labeled images"}
    backend = build_sam_backend(cfg)
    if not isinstance(backend, PointPromptBackend):
        name = type(backend).__name__
        return {"kept": False, "text": f"left out: the backend {name} does not tell what to train"}
    if backend.dtype == torch.float16:  # gradients would vanish
        backend.precision = "float32"
    rng = np.random.default_rng(derive_seed(cfg.SEED, "adaptation"))
    clicks = cfg.S4M.REFINE.NUM_POINTS
    tiles = build_tiling(cfg).records(held_out, filter_empty=True)

    def iou() -> float:
        return float(measure_sam(backend, tiles, clicks=clicks, seed=cfg.SEED).rated.mean())

    def batches() -> Iterator[list[View]]:
        shape = cfg.INPUT.TILE.SIZE, backend.image_side
        while True:
            yield [random_view(trained, *shape, rng) for _ in range(BATCH)]

    try:
        before = iou()
        adapt_sam(backend, batches(), iterations=cfg.S4M.SAM.ADAPT, clicks=clicks, rng=rng)
        after = iou()
    except DatasetError as error:  # training goes on, and names what it cannot use
        return {"kept": False, "text": f"left out: {error}"}
    kept = after > before
    saved = backend.save(os.path.join(cfg.OUTPUT_DIR, WEIGHTS)) if kept else ""
    text = f"IoU {before:.3f} before and {after:.3f} after {cfg.S4M.SAM.ADAPT} iterations, on "
    text += f"{len(held_out)} held-out labeled images; {'kept' if kept else 'not kept'}"
    weights = os.path.basename(saved)
    return {"kept": kept, "weights": weights, "before": before, "after": after, "text": text}


def random_view(records: Sequence[dict], tile: int, side: int, rng: np.random.Generator) -> View:
    """A part of a random image, turned and flipped, its longer side resized to ``side`` px, with
    some of its masks, at least one: what :func:`adapt_sam` takes.

    tile: side of the tiles that SAM will see, px of the image; 0: it will see images. DatasetError:
    no mask is large enough.
    """
    for _ in range(MOST_TRIES):
        record = records[int(rng.integers(len(records)))]
        box = _random_box((record["height"], record["width"]), tile, rng)
        for cut in cut_record(record, [box], filter_empty=True):
            chosen = rng.permutation(len(cut["annotations"]))[:MASKS_DRAWN]
            cut["annotations"] = [cut["annotations"][i] for i in chosen]
            image, masks, _ = read_window(cut, side=side)
            masks = masks[masks.sum(axis=(1, 2)) >= MIN_AREA * (side / SIDE) ** 2]
            if len(masks):
                return _turned(image, masks, rng)
    raise DatasetError(TOO_SMALL)


def _random_box(size: tuple[int, int], tile: int, rng: np.random.Generator) -> Box:
    """In an image of (H, W): a square with the side of 1 to 4 tiles; without tiles, all of it, or a
    square of at least half of its shorter side."""
    height, width = size
    shorter = min(size)
    low, high = min(tile, shorter), min(MOST_TILES * tile, shorter)
    if not tile:
        low, high = (shorter + 1) // 2, shorter
    if tile or rng.random() > WHOLE_CHANCE:
        height = width = round(np.exp(rng.uniform(np.log(low), np.log(high))))
    top, left = int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1))
    return left, top, left + width, top + height


def _turned(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> View:
    turns, step = int(rng.integers(4)), int(rng.choice([1, -1]))
    image = np.rot90(image, turns)[:, ::step].transpose(2, 0, 1)
    masks = np.rot90(masks, turns, axes=(1, 2))[:, :, ::step]
    return torch.from_numpy(image.copy()), torch.from_numpy(masks.copy())
