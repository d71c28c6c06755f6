"""The parts of a step of stage 1 and of stage 2."""

from __future__ import annotations

import functools

import numpy as np
import torch

from benchmarking import (
    checks,
    ours,
    ours_model,
    ours_views,
    plain,
    plain_model,
    plain_step,
    synthetic,
)
from benchmarking.bench import Bench
from benchmarking.data_part import data_part
from benchmarking.model_checks import deformable_part, matching_part
from benchmarking.model_parts import model_parts
from benchmarking.parts import Part, in_order
from benchmarking.plain_distillation import Distillation
from benchmarking.timing import Form

ORDER = (
    "data",
    "ema",
    "teacher",
    "selection",
    "SAM encode",
    "SAM prompts",
    "points",
    "refinement",
    "arp",
    "strong view",
    "distillation",
    "student forward",
    "deformable attention",
    "losses",
    "matching",
    "backward",
    "optimizer",
)
COPIES = 4000  # of a mask, in the check of where clicks fall


def parts_of(bench: Bench) -> list[Part]:
    """All parts of the stage's step, in order."""
    if bench.stage == 1:
        batches = [bench.labeled]
        found = [encode_part(bench), distillation_part(bench)]
    else:
        batches = [bench.labeled, ours.pseudo_labeled(bench)]
        found = labeling_parts(bench)

    @functools.cache
    def outputs() -> tuple[list[dict]]:
        with torch.no_grad():
            return (ours_model.student_outputs(bench, batches),)

    found += [
        *model_parts(bench, batches, outputs),
        matching_part(bench, batches, outputs),
        deformable_part(bench),
    ]
    return in_order([data_part(bench), *found], ORDER)


def encode_part(bench: Bench) -> Part:
    """SAM's encoder: the batch together, and image by image."""
    images, sizes = ours.rgb(bench), ours.sizes(bench)
    alone = plain_model.OneByOne(bench.sam)

    def encode_plainly():
        with torch.no_grad(), bench.autocast():
            return alone.encode(images, sizes)

    def check() -> None:
        found, expected = ours.encode(bench, images), encode_plainly()
        where = sam_tolerance(bench)
        checks.close(found.embeddings, expected.embeddings, "SAM encode", **where)

    return Part(
        "SAM encode",
        Form(lambda: ours.encode(bench, images)),
        Form(encode_plainly),
        check,
        counts_flops=True,
    )


def prompts_part(bench: Bench, clicks: list, kinds: list) -> Part:
    """SAM's answers to the clicks of all images together, and image by image."""
    alone = plain_model.OneByOne(bench.sam)

    @functools.cache
    def encoded():
        return ours.encode(bench, ours.rgb(bench))

    def prompt() -> list:
        return ours.prompt(bench, encoded(), clicks, kinds)

    def prompt_plainly() -> list:
        with torch.no_grad(), bench.autocast():
            return alone.prompt(encoded(), clicks, kinds)

    def check() -> None:
        found, expected = (
            [output.mask_logits for output in outputs] for outputs in (prompt(), prompt_plainly())
        )
        checks.close(found, expected, "SAM prompts", **sam_tolerance(bench))

    return Part("SAM prompts", Form(prompt), Form(prompt_plainly), check, counts_flops=True)


def sam_tolerance(bench: Bench) -> dict[str, float]:
    """How near the two forms of what SAM computes must be."""
    tolerance = 5e-2 if bench.cfg.SOLVER.AMP.ENABLED else 1e-3
    return {"rtol": tolerance, "atol": tolerance}


def distillation_part(bench: Bench) -> Part:
    """Structural distillation, from SAM's embeddings on: points, prompts, similarities, Huber."""
    wanted = ours_model.targets(bench, bench.labeled)
    channels = bench.cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
    shape = (len(bench.labeled), channels, bench.size[0] // 4, bench.size[1] // 4)
    features = torch.rand(shape, generator=synthetic.generator("mask features"))
    features = features.to(bench.device).requires_grad_()
    plainly = Distillation(bench.distillation)

    @functools.cache
    def encoded():
        return ours.encode(bench, ours.rgb(bench))

    def distill(loss) -> torch.Tensor:
        return ours.distill(bench, loss, encoded(), features, wanted)

    def check() -> None:
        relative = sam_tolerance(bench) | {"atol": 0.0}
        checks.close(distill(bench.distillation), distill(plainly), "distillation", **relative)

    return Part(
        "distillation",
        Form(lambda: distill(bench.distillation)),
        Form(lambda: distill(plainly)),
        check,
        counts_flops=True,
    )


def labeling_parts(bench: Bench) -> list[Part]:
    """Everything between the unlabeled batch and the student."""
    predicted = ours.known_predictions(bench)
    selected = ours.selections(bench, predicted)
    drawn = ours.points(bench, selected)
    refined = ours.refine(bench, selected)
    images = ours.arp_images(bench)
    clicks, kinds = map(list, zip(*drawn, strict=True))
    rng = np.random.default_rng(0)

    def check_refinement() -> None:
        checks.same_labels(
            ours.kept(ours.refine(bench, selected)),
            plain_step.refine_without_passes(bench, selected, rng),
            "refinement",
        )

    return [
        Part(
            "teacher",
            Form(lambda: ours.predictions(bench)),
            Form(lambda: predict_plainly(bench)),
            counts_flops=True,
        ),
        Part("selection", Form(lambda: ours.selections(bench, predicted))),
        encode_part(bench),
        prompts_part(bench, clicks, kinds),
        Part(
            "points",
            Form(lambda: ours.points(bench, selected)),
            Form(lambda: plain_step.points(bench, selected, rng)),
            lambda: check_points(bench, rng),
        ),
        Part(
            "refinement",
            Form(lambda: ours.refine(bench, selected)),
            Form(lambda: plain_step.refine_without_passes(bench, selected, rng)),
            check_refinement,
        ),
        arp_part(bench, images, refined),
        strong_view_part(bench, images),
        ema_part(bench),
    ]


def predict_plainly(bench: Bench) -> dict:
    """The teacher's pass with plain deformable attention, which has a check of its own."""
    with ours_model.forms(bench, plain_step.plain_forms(bench)):
        return ours.predictions(bench)


def check_points(bench: Bench, rng: np.random.Generator) -> None:
    """Clicks fall equally often on each pixel, in many copies of a small mask."""
    selection = ours.small_selection(bench.device, COPIES)
    found, _ = ours.clicks(selection, 2)
    other, _ = plain.mask_points(
        selection.mask_logits, selection.labels.masks, selection.content_size, 2, rng
    )
    checks.same_frequencies(found, other, "points")


def strong_view_part(bench: Bench, images: list) -> Part:
    """The student's images."""

    def check() -> None:
        checks.same_pictures(
            ours_views.strong_views(bench, images),
            plain_step.strong_views(bench, images),
            checks.LEVELS,
            "strong view",
        )

    return Part(
        "strong view",
        Form(lambda: ours_views.strong_views(bench, images)),
        Form(lambda: plain_step.strong_views(bench, images)),
        check,
    )


def arp_part(bench: Bench, images: list, refined: list) -> Part:
    """ARP; each mask of a pair is read and written."""

    def check() -> None:
        found, labels = ours.exchange(bench, images, refined)
        expected, wanted = plain_step.exchange(bench, images, present)
        checks.same_labels(ours.kept(labels), wanted, "arp")
        checks.same_pictures(found, expected, 1.0, "arp: images")

    present = ours.kept(refined)
    area = bench.size[0] * bench.size[1]
    pairs = max(1, int(bench.cfg.S4M.ARP.PAIR_FRACTION * len(images))) if len(images) > 1 else 0
    moved = pairs * 2 * area * (2 * 2 * bench.case.instances + 3 * 3)
    return Part(
        "arp",
        Form(lambda: ours.exchange(bench, images, refined)),
        Form(lambda: plain_step.exchange(bench, images, present)),
        check,
        moved_bytes=moved,
    )


def ema_part(bench: Bench) -> Part:
    """The teacher's update; two tensors are read and one is written."""
    teacher, student = bench.teacher, bench.student

    def check() -> None:
        start = {name: value.clone() for name, value in teacher.model.state_dict().items()}
        with torch.no_grad():
            for tensor in teacher.model.parameters():
                tensor.add_(1.0)  # else the teacher is the student, and nothing would move
        moved = {name: value.clone() for name, value in teacher.model.state_dict().items()}
        teacher.update(student)
        found = {name: value.clone() for name, value in teacher.model.state_dict().items()}
        teacher.model.load_state_dict(moved)
        plain.update_teacher(teacher.model, student, teacher.decay)
        expected = {name: value.clone() for name, value in teacher.model.state_dict().items()}
        teacher.model.load_state_dict(start)
        checks.same_state(found, expected, "ema")

    size = sum(p.numel() * p.element_size() for p in student.parameters())
    return Part(
        "ema",
        Form(lambda: teacher.update(student)),
        Form(lambda: plain.update_teacher(teacher.model, student, teacher.decay)),
        check,
        moved_bytes=3 * size,
    )
