"""Sizes, batch and schedule derived from statistics of own data, with reasons.

Rules of thumb between the quickstart's schedule (40 labeled images, CPU) and the published ones.
Keys set by the user are kept, and keys that depend on them are derived from them.
"""

import functools
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode

from s4m_d2.data.annotations import Annotations, targets
from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import DatasetError
from s4m_d2.structures import decode_window
from s4m_d2.tiling import Tiling

_GIB = 1 << 30
_SIZE_STEP = 32  # px: the backbone's largest stride
_ITERATION_STEP = 50
_LSJ = "coco_instance_lsj"
SET_BY_USER = "set by you"  # a reason
_NEARLY_ALL = 95  # % of the images or tiles

# Activations of a training step on a GPU: of each image (labeled or unlabeled), and of each million
# of its pixels. Fitted to tools/memory.py: ResNet-50 with AMP, crops of 512 x 1024 and 1024 x 1024.
_BYTES_OF_IMAGE, _BYTES_OF_MEGAPIXEL = _GIB // 2, 11 * _GIB // 4
_BYTES_OF_MODELS = 6 * _GIB  # both, the optimizer's state, a large SAM, and what CUDA takes itself


@dataclass(frozen=True)
class DataFacts:
    """Statistics from which the settings are derived."""

    classes: int  #: number of categories
    height: float  #: medians over the labeled images, px
    width: float
    long_side: float
    short_side: float
    labeled: int  #: number of training images with instances
    unlabeled: int  #: numbers of images
    validation: int
    most_instances: int  #: largest number of instances of an image
    instance_share: float  #: median of the instances' shares of their image's area
    in_one_piece: float = 0.0  #: share of instances with a connected mask
    tile: tuple[int, str] = (0, "")  #: side of suitable tiles, px, 0: none; and the reason
    unit: str = "image"  #: "tile": all of this, except ``validation``, is of tiles


@dataclass(frozen=True)
class Budget:
    """Limits of a kind of device: longest side of an image, and side to which smaller tiles are
    enlarged, px; for each stage (epochs, fewest and most iterations)."""

    name: str
    longest_side: int
    tile_side: int
    teacher: tuple[int, int, int]
    student: tuple[int, int, int]


GPU = Budget("on a GPU", 1024, 512, (150, 2000, 90_000), (20, 5000, 180_000))
CPU = Budget("on a CPU", 512, 192, (30, 300, 3000), (8, 800, 8000))


@dataclass(frozen=True)
class Machine:
    """Device of a run: a GPU's memory in bytes (0: CPU); processes on all machines."""

    gpu_bytes: int = 0
    processes: int = 1

    @property
    def budget(self) -> Budget:
        return GPU if self.gpu_bytes else CPU


@dataclass(frozen=True)
class Derived:
    """A setting that is derived unless the user set it, with the reason."""

    key: str
    value: Any
    reason: str


def derive(
    cfg: CfgNode, facts: DataFacts, machine: Machine, explicit: Collection[str]
) -> list[Derived]:
    """Derive the settings, each of which depends only on earlier ones, and :func:`apply` them."""
    rules = (_sizes, _model, _batch, _iterations, _teacher_of_student, _instances, _periods)
    found = (setting for rule in rules for setting in rule(cfg, facts, machine, explicit))
    return apply(cfg, found, explicit)  # a rule reads what was set before it


def apply(cfg: CfgNode, settings: Iterable[Derived], explicit: Collection[str]) -> list[Derived]:
    """Set the keys that are not ``explicit`` (the user's) in a config that is not frozen; returns
    all of them as they are now."""
    applied = []
    for setting in settings:
        if setting.key in explicit:
            value = functools.reduce(getattr, setting.key.split("."), cfg)
            setting = Derived(setting.key, value, SET_BY_USER)
        cfg.merge_from_list([setting.key, setting.value])
        applied.append(setting)
    return applied


def _up(value: float, step: int) -> int:
    return step * max(1, math.ceil(value / step))


def _sizes(cfg, facts: DataFacts, machine: Machine, explicit) -> Iterator[Derived]:
    if facts.tile[0] or "INPUT.TILE.SIZE" in explicit:
        yield Derived("INPUT.TILE.SIZE", *facts.tile)
    budget = machine.budget
    side = min(_up(facts.long_side, _SIZE_STEP), budget.longest_side)
    why = f"median of the {facts.unit}s' longer sides {facts.long_side:g} px"
    why += f", at most {side} {budget.name}" if facts.long_side > side else ""
    if cfg.INPUT.TILE.SIZE and side < budget.tile_side:
        side = budget.tile_side
        why += f", enlarged to {side} {budget.name}"
    why += f", in steps of {_SIZE_STEP}"
    is_lsj = cfg.INPUT.DATASET_MAPPER_NAME == _LSJ
    if is_lsj:
        yield Derived("INPUT.IMAGE_SIZE", side, why)
        side = cfg.INPUT.IMAGE_SIZE
    scale = side / facts.long_side
    short = max(1, round(facts.short_side * scale))
    if not is_lsj:
        crop = [_up(length * scale - 0.5, _SIZE_STEP) for length in (facts.height, facts.width)]
        one_size = "images have one size after it"
        yield Derived("INPUT.CROP.ENABLED", True, one_size)
        yield Derived("INPUT.CROP.TYPE", "absolute", one_size)
        yield Derived("INPUT.CROP.SIZE", crop, why)
        edges = tuple(max(1, short * tenth // 10) for tenth in range(5, 21))
        yield Derived("INPUT.MIN_SIZE_TRAIN", edges, "0.5 to 2 times the shorter side")
        yield Derived("INPUT.MAX_SIZE_TRAIN", 4 * side, "lets the shorter side decide")
    like_training = "the size in training, without jitter"
    yield Derived("INPUT.MIN_SIZE_TEST", short, like_training)
    yield Derived("INPUT.MAX_SIZE_TEST", side, like_training)


def _model(cfg, facts: DataFacts, machine, explicit) -> Iterator[Derived]:
    yield Derived("MODEL.SEM_SEG_HEAD.NUM_CLASSES", facts.classes, "categories of the json")
    needed = max(100, _up(1.5 * facts.most_instances, 50))
    why = f"up to {facts.most_instances} instances per {facts.unit}"
    yield Derived("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", needed, why)
    detections = max(needed, cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES)
    yield Derived("TEST.DETECTIONS_PER_IMAGE", detections, why)


def _batch(cfg, facts: DataFacts, machine: Machine, explicit) -> Iterator[Derived]:
    a_process, why = 4, "on a CPU"
    if machine.gpu_bytes:
        free = 0.9 * machine.gpu_bytes - _BYTES_OF_MODELS
        a_process = int(free / (2 * activation_bytes(cfg)))  # labeled and unlabeled
        why = f"estimated for {machine.gpu_bytes / _GIB:.0f} GiB a GPU"
    labeled = facts.labeled // machine.processes
    if labeled < a_process:
        a_process, why = labeled, f"{facts.labeled} labeled {facts.unit}s"
    # ARP exchanges instances between two images of a process.
    a_process = max(2, min(a_process, 16 // machine.processes))
    if machine.processes > 1:
        why += f", {machine.processes} processes"
    yield Derived("SOLVER.IMS_PER_BATCH", a_process * machine.processes, why)


def activation_bytes(cfg: CfgNode) -> float:
    """Bytes of an image's activations in a training step on a GPU: an estimate."""
    size, crop = cfg.INPUT, cfg.INPUT.CROP
    pixels = max(size.MIN_SIZE_TRAIN) * size.MAX_SIZE_TRAIN
    if size.DATASET_MAPPER_NAME == _LSJ:
        pixels = size.IMAGE_SIZE**2
    elif crop.ENABLED and crop.TYPE == "absolute":
        pixels = crop.SIZE[0] * crop.SIZE[1]
    return _BYTES_OF_IMAGE + _BYTES_OF_MEGAPIXEL * pixels / 1e6


def _iterations(cfg, facts: DataFacts, machine: Machine, explicit) -> Iterator[Derived]:
    budget, solver = machine.budget, cfg.SOLVER
    batch = cfg.S4M.TEACHER.IMS_PER_BATCH or solver.IMS_PER_BATCH
    teacher, why = _rounds(facts.labeled, f"labeled {facts.unit}s", batch, budget.teacher)
    if "SOLVER.MAX_ITER" in explicit and solver.MAX_ITER < teacher:
        teacher, why = solver.MAX_ITER, "not more than SOLVER.MAX_ITER"
    yield Derived("S4M.TEACHER.MAX_ITER", teacher, why)
    if not runs_stage(cfg, "student"):
        return
    batch = cfg.S4M.UNLABELED_IMS_PER_BATCH or solver.IMS_PER_BATCH
    student, why = _rounds(facts.unlabeled, f"unlabeled {facts.unit}s", batch, budget.student)
    fewest = min(2 * cfg.S4M.TEACHER.MAX_ITER, budget.student[2])
    if runs_stage(cfg, "teacher") and student < fewest:  # it may begin with the backbone alone, too
        student, why = fewest, "2 times stage 1"
    yield Derived("SOLVER.MAX_ITER", student, why)


def _rounds(images: int, kind: str, batch: int, rule: tuple[int, int, int]) -> tuple[int, str]:
    """Iterations for the epochs of a rule, within its bounds, and the reason."""
    epochs, fewest, most = rule
    wanted = _up(epochs * images / max(1, batch), _ITERATION_STEP)
    why = f"{epochs} times {images:,} {kind} in batches of {batch}"
    if fewest <= wanted <= most:
        return wanted, why
    how = "fewer" if wanted < fewest else "more"
    return min(max(wanted, fewest), most), f"{why} would be {how} than that"


def _teacher_of_student(cfg, facts, machine, explicit) -> Iterator[Derived]:
    """Burn-in and EMA decay."""
    if not runs_stage(cfg, "student"):
        return
    length = cfg.SOLVER.MAX_ITER
    part, start = 2, "nothing pre-trained"
    if cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.PRETRAINED:
        part, start = 6, "a pre-trained backbone"
    why = f"1/{part} of {length:,} iterations, with {start}"
    burn_in = round(1 / part * length)
    fewest = min(300, length // 2)  # the heads are never pre-trained
    if burn_in < fewest:
        burn_in, why = fewest, f"{why}, would be fewer than that"
    yield Derived("S4M.BURN_IN", burn_in, why)
    left = max(1, length - cfg.S4M.BURN_IN)
    half_life = max(1.0, 0.1 * left)
    decay = min(0.9996, round(0.5 ** (1 / half_life), 5))  # at most the published one
    half_life = round(math.log(0.5) / math.log(decay))
    why = f"half-life {half_life:,} of {left:,} iterations after burn-in"
    yield Derived("S4M.EMA_DECAY", decay, why)


def _instances(cfg, facts: DataFacts, machine, explicit) -> Iterator[Derived]:
    half = facts.instance_share / 2
    share, why = 0.0029, "as for COCO: smaller instances are not pasted"  # 3,000 px of 1024 x 1024
    if half < share:
        share = float(f"{half:.2g}")
        why = f"half of the median instance, {100 * facts.instance_share:.2g} % of its {facts.unit}"
    yield Derived("S4M.ARP.MIN_AREA_FRACTION", share, why)
    if facts.in_one_piece >= 0.99:
        why = f"{100 * facts.in_one_piece:.3g} % of the instances are in one piece"
        yield Derived("MODEL.MASK_FORMER.TEST.LARGEST_COMPONENT", True, why)
    if facts.most_instances > 30:  # for which the default is
        band = (cfg.S4M.PSEUDO_LABEL.COUNT_BAND[0], 2.0 * facts.most_instances)
        why = f"twice the {facts.most_instances} instances of one {facts.unit}"
        yield Derived("S4M.PSEUDO_LABEL.COUNT_BAND", band, why)


def _periods(cfg, facts: DataFacts, machine, explicit) -> Iterator[Derived]:
    longest = cfg.SOLVER.MAX_ITER if runs_stage(cfg, "student") else cfg.S4M.TEACHER.MAX_ITER
    period = _up(longest / 10, _ITERATION_STEP)
    why = f"a tenth of {longest:,} iterations"
    if facts.validation:
        yield Derived("TEST.EVAL_PERIOD", period, why)
    yield Derived("SOLVER.CHECKPOINT_PERIOD", period, why)


def suitable_tile(records: Sequence[dict]) -> tuple[int, str]:
    """Choose the side of tiles, px, for labeled images, and the reason; 0: no tiles, where the
    median instance (the longer side of its box) is at least a sixteenth of the image's side and
    nearly all images have at most 30 instances.

    Nearly all tiles have at most 12 instances, if nine tenths of the instances still fit well and
    tiles are smaller than half of the image.
    """
    records = records[:: -(-len(records) // 1000) or 1]
    sides = [max(a["bbox"][2:]) for record in records for a in targets(record)]
    if not sides:
        return 0, ""
    image = statistics.median(max(_shape(record)) for record in records)
    median, most = statistics.median(sides), _usual_most(records)
    size = min(8 * median, image)  # eight instances side by side
    if most <= 30 and 2 * size >= image:
        return 0, ""
    least = max(64, 1.5 * np.percentile(sides, 90))
    size = max(math.ceil(least / _SIZE_STEP), int(size) // _SIZE_STEP) * _SIZE_STEP
    while (in_tiles := _usual_most(Tiling(size).records(records))) > 12 and (
        size - _SIZE_STEP >= least
    ):
        size -= _SIZE_STEP
    if 2 * size >= image:
        return 0, ""
    return size, (
        f"the median instance is {median:g} px long, {_NEARLY_ALL} % of the tiles have at most "
        f"{in_tiles} instances; of images, {image:g} px long, {most}"
    )


def _usual_most(records: Sequence[dict]) -> int:
    """Maximum number of instances in nearly all records that have any."""
    counts = [count for record in records if (count := len(targets(record)))]
    return int(np.percentile(counts, _NEARLY_ALL))


def data_facts(
    labeled: Annotations,
    train: Annotations,
    unlabeled: int,
    validation: int,
    tiling: Tiling | None = None,
) -> DataFacts:
    """Compute the statistics of ``labeled`` images, of which ``train`` are trained on, and of the
    numbers of others; ``tiling`` None: :func:`suitable_tile`. DatasetError: ``train`` is empty."""
    images = train.records
    if not images:
        raise DatasetError("--labeled (S4M.DATA.LABELED) has no image to train on. Label some.")
    tile = suitable_tile(images)
    tiling = tiling or Tiling(tile[0])
    part = tiling.records(images)
    sizes = [_shape(record) for record in part]
    shares = [
        min(a["area"] / math.prod(_shape(record)), 1.0) for record in part for a in targets(record)
    ]
    return DataFacts(
        classes=len(labeled.classes),
        height=statistics.median(height for height, _ in sizes),
        width=statistics.median(width for _, width in sizes),
        long_side=statistics.median(map(max, sizes)),
        short_side=statistics.median(map(min, sizes)),
        labeled=sum(1 for record in part if targets(record)),
        unlabeled=round(unlabeled * len(part) / len(images)),
        validation=validation,
        most_instances=max(len(targets(r)) for r in tiling.records(labeled.records)),
        instance_share=statistics.median(shares or [1.0]),
        in_one_piece=_in_one_piece(images),
        tile=tile,
        unit="tile" if tiling.size else "image",
    )


def _in_one_piece(records: Sequence[dict]) -> float:
    """Share of evenly spaced instances; of encoded masks, so many that 2^28 pixels are decoded."""
    shapes = [a["segmentation"] for record in records for a in targets(record)]
    pixels = sum(math.prod(shape["size"]) for shape in shapes if isinstance(shape, dict))
    some = shapes[:: -(-pixels // (1 << 28)) or 1]
    return statistics.mean([_pieces(shape) == 1 for shape in some] or [False])


def _pieces(shape: list | dict) -> int:
    if isinstance(shape, list):  # of polygons
        return len(shape)
    return cv2.connectedComponents(np.ascontiguousarray(decode_window(shape)[0]))[0] - 1


def _shape(record: dict) -> tuple[int, int]:
    x0, y0, x1, y1 = record.get("tile", (0, 0, record["width"], record["height"]))
    return y1 - y0, x1 - x0
