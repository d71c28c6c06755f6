"""Every call of the benchmark into the project's training step, beside ``bench``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor

from benchmarking import plain, synthetic
from benchmarking.bench import Bench
from s4m_d2.engine import BadSteps, StudentStep, TeacherStep
from s4m_d2.engine.training.step import PRECISIONS
from s4m_d2.layers import ms_deform_attn
from s4m_d2.modeling.meta_arch import prepare_target
from s4m_d2.semi.ema_teacher import TeacherPhase
from s4m_d2.semi.refinement import sample_mask_points
from s4m_d2.structures import sample_generators


@torch.no_grad()
def predictions(bench: Bench) -> dict:
    """The teacher's forward pass over the weak views."""
    with bench.autocast():
        return bench.teacher.model.predict_queries(bench.weak)


@torch.no_grad()
def encode(bench: Bench, backend, images: Tensor):
    """SAM's encoding of a batch."""
    with bench.autocast():
        return backend.encode(images, bench.sizes)


@torch.no_grad()
def prompt(bench: Bench, backend, encoded, clicks: Sequence, kinds: Sequence) -> list[Tensor]:
    """The masks that SAM answers to the prompts of a batch."""
    with bench.autocast():
        return [output.mask_logits for output in backend.prompt(encoded, clicks, kinds)]


def points(bench: Bench, selected: Sequence) -> list[tuple[Tensor, ...]]:
    """Clicks in every mask of the batch, and their labels."""
    generators = sample_generators(bench.unlabeled, "refine_points", "cpu")
    count = itertools.repeat(bench.cfg.S4M.REFINE.NUM_POINTS)
    drawn = map(sample_mask_points, selected, count, generators)
    return list(zip(*drawn, strict=True))


@torch.no_grad()
def refine(bench: Bench, selected: Sequence) -> list:
    """Refined pseudo-labels, with SAM's passes left out: points, best masks, image size."""
    with bench.autocast(), patch.object(bench.answers, "passes", False):
        return bench.labeling.refine(bench.weak, selected).labels


def exchange(bench: Bench, images: Sequence[Tensor], labels: Sequence):
    """ARP."""
    return bench.labeling.arp(images, labels, sample_generators(bench.unlabeled, "arp", "cpu"))


def strong_views(bench: Bench, images: Sequence[Tensor]) -> list[Tensor]:
    """The student's images."""
    generators = sample_generators(bench.unlabeled, "strong_view", "cpu")
    return bench.labeling.strong_view(images, generators)


def pseudo_labeled(bench: Bench) -> list[dict]:
    """Unlabeled samples with instances, as the labeling hands them to the student."""
    parts = (len(bench.unlabeled), bench.size, bench.case.instances, bench.num_classes)
    others = synthetic.samples("labeled", *parts)
    images = [sample["image"].to(bench.device) for sample in bench.unlabeled]
    samples = zip(bench.unlabeled, images, others, strict=True)
    return [{**s, "image": image, "instances": o["instances"]} for s, image, o in samples]


def distill(bench: Bench, loss, encoded, mask_features: Tensor, wanted: Sequence[dict]) -> Tensor:
    """Structural distillation of a batch that SAM has encoded."""
    masks = [target["masks"] for target in wanted]
    generators = sample_generators(bench.labeled, "prompt_points", bench.device)
    with patch.object(bench.sam, "encode", lambda *_: encoded), bench.autocast():
        return loss(mask_features, bench.rgb, bench.sizes, masks, generators)["loss_sd"]


def student_outputs(bench: Bench, batches: Sequence[list[dict]]) -> list[dict]:
    """What the student's forward in training hands to the criterion, instead of losses."""
    seen: list[dict] = []
    keep = patch.object(bench.student.criterion, "forward", lambda x, *_: seen.append(x) or {})
    with keep, patch.object(bench.student, "distillation", None), bench.autocast():
        for batch in batches:
            bench.student(batch)
    return seen


def targets(bench: Bench, batch: list[dict]) -> list[dict]:
    """The criterion's targets."""
    return [prepare_target(x, bench.size, bench.num_classes, bench.device) for x in batch]


def losses(bench: Bench, outputs: Sequence[dict], wanted: Sequence, batches: Sequence) -> Tensor:
    """The sum of all losses but the distillation's."""
    weights = (1.0, bench.cfg.S4M.UNSUP_LOSS_WEIGHT)
    total = 0.0
    for output, target, batch, weight in zip(outputs, wanted, batches, weights, strict=False):
        generators = sample_generators(batch, "loss_points", bench.device)
        found = bench.student.criterion(output, target, generators)
        total = total + weight * sum(found.values())
    return total


def match(bench: Bench, matcher, outputs: list[dict], wanted: list, batches: list) -> list:
    """The matched queries (L, M) of each image of all batches, for all layers."""
    return [
        torch.from_numpy(image.queries)
        for output, target, batch in zip(outputs, wanted, batches, strict=True)
        for image in matcher(
            [output, *output["aux_outputs"]],
            target,
            sample_generators(batch, "loss_points", bench.device),
        )
    ]


@contextlib.contextmanager
def plain_model(bench: Bench) -> Iterator[None]:
    """Use plain deformable attention in all models, and plain matching in the criterion."""
    criterion = bench.student.criterion
    matcher = patch.object(criterion, "matcher", plain.Matcher(**vars(criterion.matcher)))
    with matcher, patch.object(ms_deform_attn, "deformable_sampling", plain.deformable_sampling):
        yield


def step_losses(bench: Bench) -> dict[str, Tensor]:
    """All losses of a step, from its batches on."""
    step = stage_step(bench)
    with bench.autocast():
        if bench.stage == 1:
            return step.model(bench.labeled)
        views = bench.labeling(bench.unlabeled)
        return step.model(bench.labeled) | step.weighted(step.model(views.student_batch))


def stage_step(bench: Bench) -> TeacherStep:
    """The stage's step, around the same batch again and again."""
    precision = PRECISIONS[bench.cfg.S4M.AMP_PRECISION] if bench.half else None
    bad_steps = BadSteps(1_000_000, "unused", seed=0)
    batch = bench.labeled if bench.stage == 1 else (bench.labeled, bench.unlabeled)
    parts = (bench.student, itertools.repeat(batch), bench.optimizer, bad_steps, precision)
    if bench.stage == 1:
        return TeacherStep(*parts)
    weight = bench.cfg.S4M.UNSUP_LOSS_WEIGHT
    return StudentStep(*parts, labeling=bench.labeling, unsup_loss_weight=weight)


def training_step(bench: Bench) -> Callable[[], None]:
    """The stage's step; a call makes one.

    In stage 2 the EMA update comes first, as EMATeacherHook makes it.
    """
    trainer = stage_step(bench)
    trainer.iter = trainer.start_iter = 0

    def step() -> None:
        with EventStorage(0) as trainer.storage:
            if bench.teacher is not None:
                bench.teacher.step(bench.student, TeacherPhase.EMA)
            trainer.run_step()

    return step
