"""Whether the run's SAM helps: its masks measured on labeled images, the gate, and its fine-tuning.

Not part of the paper: SAM helps where it knows the images, and harms where it does not. The quality
of its masks is the IoU of its answers to clicks with the true masks; refined masks are compared
with the teacher's own by labels that the teacher has not seen.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch import Tensor, nn

from s4m_d2.data.annotations import targets
from s4m_d2.data.images import read_image
from s4m_d2.data.segmentations import annotation_masks
from s4m_d2.data.splits import photograph, true_records
from s4m_d2.engine.checkpointing.checkpoint import holds_run
from s4m_d2.engine.checks.resource_checks import sam_bytes
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.labeling.quality import AFTER, BEFORE, QualityMeasurement, quality_class_names
from s4m_d2.engine.rng import derive_seed, undisturbed_generators
from s4m_d2.engine.stages import STAGES, needs_sam, run_folder, runs_stage
from s4m_d2.engine.training.build import labeled_names
from s4m_d2.engine.training.stop_signals import interruptible, stop_if_asked
from s4m_d2.errors import DatasetError, Finding, attempt
from s4m_d2.files import atomic_write
from s4m_d2.report import read_results, stored_results, write_results
from s4m_d2.report.run import CONFIG
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.sam.adaptation import View, adapt_sam, draw_clicks
from s4m_d2.sam.point_prompts import PointPromptBackend
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.refinement import AUTO_PROMPT, PROMPTS, TeacherMasks
from s4m_d2.tiling import Box, build_tiling, cut_record

logger = logging.getLogger(__name__)

OFF, WARN, AUTO = GATES = ("off", "warn", "auto")  # values of S4M.REFINE.GATE
HELD_OUT_SHARE = 0.2  # of the labeled images, for the gate
_FEWEST_LABELED = 10
# In the folder of stage 2, of stage 1, of the run.
RESULT, SAM_RESULT, ADAPTED = "refinement_gate.json", "sam_quality.json", "sam_adapted.json"
WEIGHTS = "sam_adapted"  # beside ADAPTED
USEFUL_IOU = 0.6  # a rule of thumb: below it, SAM's masks are rarely better than the teacher's
IMAGES = 16  # labeled images, or tiles, that are measured at most
_QUICK_BYTES = 64 << 20  # of a SAM that measures them in seconds on a CPU
_MOST_CLASSES = 5  # that a line names

SIDE = 256  # px that the long side of an image counts, whatever its size
MIN_AREA = 40  # of these px
SIZE_LIMITS = (0, 16, 32, 64, SIDE + 1)
_TOO_SMALL = f"no image has a mask of {MIN_AREA} px, where its longer side counts {SIDE} px"

BATCH, MASKS_DRAWN = 4, 24  # of SAM's fine-tuning
WHOLE_CHANCE, MOST_TILES, MOST_TRIES = 0.4, 4, 1000  # of a view

#: For JSON and checkpoints. "choice": a prompt or "off"; "drops_arp": whether ARP is off too;
#: "text"; if masks were compared, also "images", or tiles, and "pq", before and with each prompt.
#: {}: none was made.
Decision = dict[str, Any]


def held_out_records(cfg: CfgNode) -> list[dict]:
    """The labeled images that stage 1 leaves to the gate, a fifth; none where the gate is off, the
    teacher is another run's, or fewer than ten images are labeled."""
    on = cfg.S4M.REFINE.ENABLED and cfg.S4M.REFINE.GATE != OFF
    if not (on and runs_stage(cfg, "teacher") and runs_stage(cfg, "student")):
        return []
    records = true_records(labeled_names(cfg))
    return _share(records) if len(records) >= _FEWEST_LABELED else []


def _share(records: list[dict]) -> list[dict]:
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
    names = {record["file_name"] for record in _share(records)}
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
        raise DatasetError(_TOO_SMALL)
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


def compare_refinement(cfg: CfgNode, labeling: PseudoLabeling) -> Decision:
    """Compare the pseudo-labels of stage 1's teacher before and after refinement, and decide.

    By their PQ on the images that stage 1 left out. With S4M.REFINE.PROMPT "auto" the best prompt
    is taken; with S4M.REFINE.GATE "auto" refinement is switched off where the teacher's own masks
    are better, and ARP with it, as it hurts unrefined labels (paper). All processes call it.
    """
    records, settings = held_out_records(cfg), cfg.S4M.REFINE
    if not records:
        return {}
    prompt = settings.PROMPT if _is_prompted(labeling) else settings.METHOD
    measurement = QualityMeasurement(cfg, labeling, records)
    prompts = PROMPTS if prompt == AUTO_PROMPT else (prompt,)
    pq: dict[str, float] = {}
    images = 0
    for prompt in prompts:
        if _is_prompted(labeling):
            labeling.refiner.prompt = prompt
        if report := measurement():
            images = report.steps[BEFORE].images
            for name, step in ((BEFORE, BEFORE), (prompt, AFTER)):
                pq[name] = report.steps[step].overall()["pq"] or 0.0
    pq, images = comm.all_gather((pq, images))[0]
    best = max(prompts, key=lambda prompt: pq[prompt])
    gain = pq[best] - pq[BEFORE]
    choice = OFF if cfg.S4M.REFINE.GATE == AUTO and gain < 0 else best
    drops_arp = choice == OFF and cfg.S4M.ARP.GATED and labeling.arp is not None
    verdict = f"helps, with {best}" if gain > 0 else "makes no difference"
    verdict = "makes masks worse" if gain < 0 else verdict
    verdict += ", and is switched off" * (choice == OFF) + ", as is ARP" * drops_arp
    values = ", ".join(f"{name} {100 * value:.1f}" for name, value in pq.items())
    text = f"refinement {verdict}: PQ {values}, on {images} labeled images or tiles"
    logger.log(logging.WARNING if gain < 0 else logging.INFO, "S4M.REFINE.GATE: %s.", text)
    return {"images": images, "pq": pq, "choice": choice, "drops_arp": drops_arp, "text": text}


def apply_decision(decision: Decision, labeling: PseudoLabeling) -> None:
    """Change refiner and ARP as was decided."""
    if decision.get("drops_arp"):
        labeling.arp = None
    choice = decision.get("choice")
    if choice == OFF:
        labeling.refiner = TeacherMasks()
    elif choice and _is_prompted(labeling):
        labeling.refiner.prompt = choice


def _is_prompted(labeling: PseudoLabeling) -> bool:
    """Whether the refiner has prompts to choose from; any callable may be one."""
    return hasattr(labeling.refiner, "prompt")


def labeling_of_run(
    cfg: CfgNode, weights: str, model: nn.Module, backend: SamBackend | None = None
) -> PseudoLabeling:
    """Build what labels images with ``model``, as decided by the gate of the run, if one did.

    ``weights``: file of the model, in a stage's folder of the run, which may also be the config's
    OUTPUT_DIR; ``backend`` None: the config's.
    """
    labeling = PseudoLabeling(cfg, EMATeacher(model, cfg.S4M.EMA_DECAY), backend)
    if cfg.S4M.REFINE.ENABLED and cfg.S4M.REFINE.GATE != OFF:
        apply_decision(_decision_of_run(cfg, weights), labeling)
    return labeling


def _decision_of_run(cfg: CfgNode, weights: str) -> Decision:
    """That of the weights' run, or else of the config's; a run of stage 1 alone has SAM's IoU."""
    for folder in (run_folder(weights), cfg.OUTPUT_DIR):
        path = os.path.join(folder, "student", RESULT)
        if os.path.isfile(path):
            return read_results(path)
        if _is_dismissed(cfg, stored_results(os.path.join(folder, "teacher", SAM_RESULT))):
            return {"choice": OFF}
    return {}


def _is_dismissed(cfg: CfgNode, measured: dict[str, Any]) -> bool:
    """Whether the gate leaves SAM out, by :func:`labeled_quality` or {}."""
    return cfg.S4M.REFINE.GATE == AUTO and measured.get("iou", 1.0) < USEFUL_IOU


def decide_by_sam(cfg: CfgNode, stage: str, *, resume: bool) -> CfgNode:
    """The config of a stage after a measurement of SAM; all processes call it.

    With S4M.REFINE.GATE "auto" and an IoU below 0.6, stage 1 has no structural distillation; stage
    2, if the gate cannot compare its teacher's masks, no refinement, and no ARP unless the user
    set it, which is noted as the gate's decision. A run that continues keeps what was decided.
    """
    gate, is_main = cfg.S4M.REFINE.GATE, comm.is_main_process()
    if gate == OFF or stage == "finetune" or not any(needs_sam(cfg, s) for s in STAGES):
        return cfg
    if stage == "student" and (not cfg.S4M.REFINE.ENABLED or held_out_records(cfg)):
        return cfg
    found = {}
    if is_main:
        with interruptible():
            found = _measured(cfg, stage, resume)
    stop_if_asked()
    found = comm.all_gather(found)[0]
    if found and is_main:
        level = logging.INFO if found["iou"] >= USEFUL_IOU else logging.WARNING
        logger.log(level, "S4M.REFINE.GATE: SAM's masks: %s.", found["text"])
    if not _is_dismissed(cfg, found):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    if stage == "teacher":
        cfg.S4M.DISTILL.ENABLED = False
    else:
        drops_arp = cfg.S4M.ARP.ENABLED and cfg.S4M.ARP.GATED
        cfg.S4M.REFINE.ENABLED, cfg.S4M.ARP.ENABLED = False, cfg.S4M.ARP.ENABLED and not drops_arp
        if is_main:  # for whoever labels with this run's models
            text = f"refinement is switched off{', as is ARP' * drops_arp}: {found['text']}"
            decision = {"choice": OFF, "drops_arp": drops_arp, "text": text}
            write_results(decision, os.path.join(cfg.OUTPUT_DIR, RESULT))
    cfg.freeze()
    return cfg


def _measured(cfg: CfgNode, stage: str, resume: bool) -> dict[str, Any]:
    """What was measured for this stage or, in this run, for stage 1; {}: nothing was."""
    path = os.path.join(cfg.OUTPUT_DIR, SAM_RESULT)
    of_run = os.path.join(os.path.dirname(cfg.OUTPUT_DIR), "teacher", SAM_RESULT)
    measured = {} if stage == "teacher" or cfg.S4M.TEACHER_WEIGHTS else stored_results(of_run)
    if measured:
        return measured
    if resume and holds_run(cfg.OUTPUT_DIR):
        return stored_results(path)
    found, errors = attempt(labeled_quality, cfg)
    if found is None:
        logger.warning("S4M.REFINE.GATE: SAM was not measured: %s", errors[0])
        return {}
    if stage == "teacher" and _is_dismissed(cfg, found):
        found["text"] += "; stage 1 has no structural distillation"
    write_results(found, path)
    return found


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
    raise DatasetError(_TOO_SMALL)


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
