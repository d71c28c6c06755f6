"""A whole step of stage 2, and the labeling's parts, assembled from the plain forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances
from torch import Tensor

from benchmarking import checks, ours, ours_model, ours_views, plain, plain_model
from benchmarking.bench import Bench
from benchmarking.plain_distillation import Distillation
from s4m_d2.structures import PseudoLabels, sample_generators


def matcher(bench: Bench) -> plain_model.Matcher:
    """The plain matcher with the config's weights."""
    former = bench.cfg.MODEL.MASK_FORMER
    return plain_model.Matcher(
        former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT, former.TRAIN_NUM_POINTS
    )


def plain_forms(bench: Bench) -> ours_model.ModelForms:
    """What models and criterion use in the plain step."""
    return ours_model.ModelForms(plain_model.deformable_sampling, matcher(bench))


@torch.no_grad()
def points(bench: Bench, selected: Sequence, rng: np.random.Generator) -> list:
    """Clicks in every mask of the batch."""
    return [
        plain.mask_points(
            one.mask_logits,
            one.labels.masks,
            one.content_size,
            bench.cfg.S4M.REFINE.NUM_POINTS,
            rng,
        )
        for one in selected
    ]


@torch.no_grad()
def refine(bench: Bench, selected: Sequence, rng: np.random.Generator) -> list[PseudoLabels]:
    """Image by image: encode, draw, prompt, choose, resize. SAM's passes as ``bench.answers`` do.

    Masks that SAM leaves empty would have to fall back to the teacher's; the synthetic answers
    have none.
    """
    drawn = points(bench, selected, rng)
    clicks, kinds = map(list, zip(*drawn, strict=True))
    with bench.autocast():
        encoded = plain_model.encode_one_by_one(bench.answers, ours.rgb(bench), ours.sizes(bench))
        outputs = []
        for index, one in enumerate(encoded):
            output = bench.answers.only(index).prompt(one, [clicks[index]], [kinds[index]])[0]
            outputs.append(output)
        return [
            one.labels.with_masks(
                plain.image_masks(
                    bench.answers.upscale,
                    plain.best_masks(output.mask_logits, output.iou_predictions),
                    bench.size,
                )
            )
            for one, output in zip(selected, outputs, strict=True)
        ]


def refine_without_passes(bench: Bench, selected: Sequence, rng: np.random.Generator):
    """:func:`refine` with neither SAM's encoder nor its decoder."""
    with bench.answers.without_passes():
        return refine(bench, selected, rng)


@torch.no_grad()
def exchange(bench: Bench, images: Sequence[Tensor], labels: Sequence[PseudoLabels]):
    """ARP with the draws that the samples' seeds give."""
    arp = bench.cfg.S4M.ARP
    generators = sample_generators(bench.unlabeled, "arp", "cpu")
    min_area = ours.min_area(bench)
    exchanges = []
    if len(images) > 1:
        order = torch.randperm(len(images), generator=generators[0]).tolist()
        for pair in range(max(1, int(arp.PAIR_FRACTION * len(images)))):
            first, second = order[2 * pair : 2 * pair + 2]
            exchanges += [plain.Exchange(first, second), plain.Exchange(second, first)]
    if arp.RANDOM_PLACEMENT:
        for index, one in enumerate(exchanges):
            areas = [mask.sum().item() for mask in labels[one.source].masks]
            pasted = sum(area >= min_area for area in areas)
            draws = torch.rand(pasted, 3, generator=generators[one.base])
            exchanges[index] = plain.Exchange(one.source, one.base, draws)
    return plain.exchange_instances(images, labels, exchanges, min_area, tuple(arp.SCALE_RANGE))


@torch.no_grad()
def strong_views(bench: Bench, images: Sequence[Tensor]) -> list[Tensor]:
    """The student's images, one by one on the host."""
    draws = ours_views.strong_view_draws(bench)
    return [
        plain.strong_view(image, draw, ours_views.BLUR_REACH)
        for image, draw in zip(images, draws, strict=True)
    ]


def student_batch(bench: Bench, images: Sequence[Tensor], labels: Sequence[PseudoLabels]) -> list:
    """Samples of the student from images and pseudo-labels."""
    batch = []
    for sample, image, label in zip(bench.unlabeled, images, labels, strict=True):
        masks = BitMasks(label.masks)
        instances = Instances(
            label.image_size,
            gt_classes=label.labels,
            gt_masks=masks,
            gt_boxes=masks.get_bounding_boxes(),
        )
        batch.append({**sample, "image": image, "instances": instances})
    return batch


def losses(bench: Bench, rng: np.random.Generator) -> dict[str, Tensor]:
    """All losses of a step."""
    with ours_model.forms(bench, plain_forms(bench)):
        return distilled_losses(bench) if bench.stage == 1 else unsupervised_losses(bench, rng)


def distilled_losses(bench: Bench) -> dict[str, Tensor]:
    """Stage 1, with SAM and the distillation image by image."""
    bench.distillation.backend = plain_model.OneByOne(bench.sam)
    bench.student.distillation = Distillation(bench.distillation)
    try:
        with bench.autocast():
            return bench.student(bench.labeled)
    finally:
        bench.distillation.backend = bench.sam
        bench.student.distillation = bench.distillation


def unsupervised_losses(bench: Bench, rng: np.random.Generator) -> dict[str, Tensor]:
    """Stage 2: labeling and two passes of the student."""
    selected = ours.selections(bench, ours.predictions(bench))
    labels = refine(bench, selected, rng)
    images, labels = exchange(bench, ours.arp_images(bench), labels)
    batch = student_batch(bench, strong_views(bench, images), labels)
    weight = bench.cfg.S4M.UNSUP_LOSS_WEIGHT
    with bench.autocast():
        found = dict(bench.student(bench.labeled))
        for name, loss in bench.student(batch).items():
            found[f"unsup/{name}"] = weight * loss
    return found


def check_step(bench: Bench) -> None:
    """The losses of a whole step, with the strong view, whose rounding differs, left out."""
    view = bench.labeling.strong_view if bench.labeling else None
    if bench.labeling:
        bench.labeling.strong_view = ours_views.unchanged
    try:
        with torch.no_grad():
            found = ours.step_losses(bench)
            expected = losses(bench, np.random.default_rng(0))
    finally:
        if bench.labeling:
            bench.labeling.strong_view = view
    checks.require(found.keys() == expected.keys(), "step")
    tolerance = 0.1 if bench.cfg.SOLVER.AMP.ENABLED else 5e-3
    for name, loss in found.items():
        checks.close(loss, expected[name], f"step: {name}", rtol=tolerance, atol=tolerance)


class TrainingStep:
    """One step after another, as a plain loop: EMA, losses, backward, update."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._rng = np.random.default_rng(0)
        amp = bench.cfg.SOLVER.AMP.ENABLED
        self._scaler = torch.amp.GradScaler(bench.device.type, enabled=amp)

    def __call__(self) -> dict[str, float]:
        bench = self._bench
        if bench.teacher is not None:
            plain.update_teacher(bench.teacher.model, bench.student, bench.teacher.decay)
        found = losses(bench, self._rng)
        bench.optimizer.zero_grad()
        self._scaler.scale(sum(found.values())).backward()
        logged = {name: loss.item() for name, loss in found.items()}
        self._scaler.unscale_(bench.optimizer)
        self._scaler.step(bench.optimizer)
        self._scaler.update()
        return logged
