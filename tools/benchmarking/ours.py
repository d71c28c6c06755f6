"""Every call of the benchmark into the project's training step.

Beside ``bench``, which builds the models, ``ours_model`` and ``ours_views``, this is the only
module here that knows what a step consists of. Where an interface of the project changes, these
have to follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarking import synthetic
from benchmarking.bench import Bench
from benchmarking.fixed_sam import KnownImages
from s4m_d2.engine import BadSteps, StudentStep, TeacherStep
from s4m_d2.engine.training.step import PRECISIONS
from s4m_d2.semi import Selection, mask_points
from s4m_d2.structures import PseudoLabels, drop_empty, sample_generators


def weak_samples(bench: Bench) -> list[dict]:
    """The unlabeled batch as the teacher sees it."""
    return [{**sample, "image": sample["image_weak"]} for sample in bench.unlabeled]


@torch.no_grad()
def predictions(bench: Bench) -> dict:
    """The teacher's forward pass over the weak views."""
    with bench.autocast():
        return bench.teacher.model.predict_queries(weak_samples(bench))


def known_predictions(bench: Bench) -> dict:
    """The predictions that :func:`predictions` ends with, without the teacher's pass."""
    former = bench.cfg.MODEL.MASK_FORMER
    logits, masks = synthetic.query_predictions(
        len(bench.unlabeled),
        former.NUM_OBJECT_QUERIES,
        (bench.size[0] // 4, bench.size[1] // 4),
        bench.case.instances,
        bench.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    )
    return {
        "pred_logits": logits.to(bench.device),
        "pred_masks": masks.to(bench.device),
        "image_sizes": sizes(bench),
        "padded_size": bench.size,
    }


@torch.no_grad()
def selections(bench: Bench, predicted: dict) -> list:
    """Pseudo-labels of the batch at the prediction's resolution."""
    return bench.labeling.select(predicted)


def rgb(bench: Bench) -> Tensor:
    """(B, 3, H, W) uint8 on the device: what SAM sees in this stage."""
    samples = weak_samples(bench) if bench.stage == 2 else bench.labeled
    return torch.stack([sample["image"] for sample in samples]).to(bench.device)


def sizes(bench: Bench) -> list[tuple[int, int]]:
    """(H, W) of each image of a batch."""
    return [bench.size] * len(bench.labeled)


@torch.no_grad()
def encode(bench: Bench, images: Tensor):
    """SAM's encoding of a batch."""
    with bench.autocast():
        return bench.sam.encode(images, sizes(bench))


@torch.no_grad()
def points(bench: Bench, selected: Sequence) -> list[tuple[Tensor, Tensor]]:
    """Clicks in every mask of the batch."""
    generators = sample_generators(bench.unlabeled, "refine_points", "cpu")
    count = bench.cfg.S4M.REFINE.NUM_POINTS
    drawn = mask_points.sample_points_in_batch(selected, count, generators)
    return list(zip(*drawn, strict=True))


def kept(labels: Sequence[PseudoLabels]) -> list[PseudoLabels]:
    """Pseudo-labels without those that are flagged as absent."""
    return drop_empty(labels)


@torch.no_grad()
def clicks(selection: Selection, count: int) -> tuple[Tensor, Tensor]:
    """Clicks in each mask of one image."""
    device = selection.mask_logits.device
    return mask_points.sample_mask_points(selection, count, torch.Generator(device).manual_seed(0))


def small_selection(device: torch.device, copies: int) -> Selection:
    """``copies`` of one mask of five pixels with different logits, on a map of 3 x 4."""
    logits = torch.full((3, 4), -2.0)
    logits[1, 1:] = torch.tensor([0.5, 1.5, 2.5])
    logits[2, :2] = torch.tensor([1.0, 2.0])
    logits = logits.to(device).expand(copies, 3, 4)
    labels = torch.zeros(copies, dtype=torch.int64, device=device)
    kept = PseudoLabels(labels, logits > 0, torch.ones(copies, device=device))
    return Selection(kept, logits, content_size=(3.0, 4.0), stats={})


@torch.no_grad()
def prompt(bench: Bench, encoded, clicks: Sequence, labels: Sequence) -> list:
    """SAM's answers to the prompts of a batch."""
    with bench.autocast():
        return bench.sam.prompt(encoded, clicks, labels)


@torch.no_grad()
def refine(bench: Bench, selected: Sequence) -> list:
    """Refined pseudo-labels, with SAM's passes left out: points, best masks, image size."""
    with bench.autocast(), bench.answers.without_passes():
        return bench.labeling.refine(weak_samples(bench), selected, bench.device).labels


def arp_images(bench: Bench) -> list[Tensor]:
    """The unlabeled images on the device, as ARP gets them."""
    return [sample["image"].to(bench.device) for sample in bench.unlabeled]


def min_area(bench: Bench) -> float:
    """Area of the smallest mask that ARP pastes, px."""
    return bench.labeling.arp.min_area


@torch.no_grad()
def exchange(bench: Bench, images: Sequence[Tensor], labels: Sequence):
    """ARP."""
    return bench.labeling.arp(images, labels, sample_generators(bench.unlabeled, "arp", "cpu"))


def pseudo_labeled(bench: Bench) -> list[dict]:
    """Unlabeled samples with instances, as the labeling hands them to the student."""
    labeled = synthetic.samples(
        "labeled",
        len(bench.unlabeled),
        bench.size,
        bench.case.instances,
        bench.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    )
    return [
        {**sample, "image": sample["image"].to(bench.device), "instances": other["instances"]}
        for sample, other in zip(bench.unlabeled, labeled, strict=True)
    ]


def distill(bench: Bench, loss, encoded, mask_features: Tensor, wanted: Sequence[dict]) -> Tensor:
    """Structural distillation of a batch that SAM has encoded, by a loss on the bench's backend."""
    bench.distillation.backend = KnownImages(bench.sam, encoded)
    try:
        with bench.autocast():
            return loss(
                mask_features,
                rgb(bench),
                sizes(bench),
                [target["masks"] for target in wanted],
                sample_generators(bench.labeled, "prompt_points", bench.device),
            )["loss_sd"]
    finally:
        bench.distillation.backend = bench.sam


def step_batch(bench: Bench):
    """What the loaders of the stage give."""
    return bench.labeled if bench.stage == 1 else (bench.labeled, bench.unlabeled)


def step_losses(bench: Bench) -> dict[str, Tensor]:
    """All losses of a step, from its batches on."""
    step = stage_step(bench)
    with bench.autocast():
        if bench.stage == 1:
            return step.losses(bench.labeled)
        views = bench.labeling(bench.unlabeled)
        return step.losses(bench.labeled) | step.weighted(step.losses(views.student_batch))


def stage_step(bench: Bench) -> TeacherStep:
    """The stage's step, around the same batch again and again."""
    student = bench.student
    if comm.get_world_size() > 1:
        devices = [bench.device.index] if bench.device.type == "cuda" else None
        student = DistributedDataParallel(student, device_ids=devices, broadcast_buffers=False)
    precision = PRECISIONS[bench.cfg.S4M.AMP_PRECISION] if bench.cfg.SOLVER.AMP.ENABLED else None
    bad_steps = BadSteps(1_000_000, "unused", seed=0)
    batches = itertools.repeat(step_batch(bench))
    parts = (student, batches, bench.optimizer, bad_steps, precision)
    if bench.stage == 1:
        return TeacherStep(*parts)
    weight = bench.cfg.S4M.UNSUP_LOSS_WEIGHT
    return StudentStep(*parts, labeling=bench.labeling, unsup_loss_weight=weight)


def training_step(bench: Bench) -> Callable[[], dict[str, float]]:
    """The stage's step; a call makes one.

    In stage 2 the EMA update comes first, as EMATeacherHook makes it.
    """
    trainer = stage_step(bench)
    trainer.iter = trainer.start_iter = 0

    def step() -> dict[str, float]:
        with EventStorage(0) as trainer.storage:
            if bench.teacher is not None:
                bench.teacher.update(bench.student)
            trainer.run_step()
            return {name: value for name, (value, _) in trainer.storage.latest().items()}

    return step
