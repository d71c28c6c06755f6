"""A whole step, and the labeling's parts of it, assembled from the plain forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarking import ours, plain
from benchmarking.bench import Bench, OneByOne
from s4m_d2.structures import PseudoLabels, sample_generators


@torch.no_grad()
def points(bench: Bench, selected: Sequence, rng: np.random.Generator) -> list:
    """Clicks in every mask of the batch, and their labels, image by image."""
    count = bench.cfg.S4M.REFINE.NUM_POINTS
    return [plain.mask_points(one, count, rng) for one in selected]


@torch.no_grad()
def refine(bench: Bench, selected: Sequence, rng: np.random.Generator) -> list[PseudoLabels]:
    """Image by image: encode, draw, prompt, choose, resize; no synthetic answer is empty."""
    labels, answers, images = [], bench.answers, bench.rgb
    drawn = points(bench, selected, rng)
    for index, (one, (clicks, kinds)) in enumerate(zip(selected, drawn, strict=True)):
        own = patch.object(answers, "answers", answers.answers[index : index + 1])
        with bench.autocast(), own:
            encoded = answers.encode(images[index, None], [bench.size])
            [output] = answers.prompt(encoded, [clicks], [kinds])
        rated = zip(output.mask_logits, output.iou_predictions, strict=True)
        best = [logits[int(ious.argmax()), None] for logits, ious in rated]
        masks = torch.cat([answers.upscale(logits, bench.size) > 0 for logits in best])
        labels.append(one.labels.with_masks(masks))
    return labels


@torch.no_grad()
def exchange(bench: Bench, images: Sequence[Tensor], labels: Sequence[PseudoLabels]):
    """ARP with the draws that the samples' seeds give."""
    arp, min_area = bench.cfg.S4M.ARP, bench.labeling.arp.min_area
    generators = sample_generators(bench.unlabeled, "arp", "cpu")
    pairs, exchanges = [], []
    if len(images) > 1:
        order = torch.randperm(len(images), generator=generators[0]).tolist()
        for pair in range(max(1, int(arp.PAIR_FRACTION * len(images)))):
            first, second = order[2 * pair : 2 * pair + 2]
            pairs += [(first, second), (second, first)]
    for source, base in pairs:
        pasted = sum(mask.sum().item() >= min_area for mask in labels[source].masks)
        draws = torch.rand(pasted, 3, generator=generators[base]) if arp.RANDOM_PLACEMENT else None
        exchanges.append((source, base, draws))
    return plain.exchange_instances(images, labels, exchanges, min_area, tuple(arp.SCALE_RANGE))


@torch.no_grad()
def strong_views(bench: Bench, images: Sequence[Tensor]) -> list[Tensor]:
    """The student's images, one by one on the host."""
    generators = sample_generators(bench.unlabeled, "strong_view", "cpu")
    settings = bench.cfg.S4M.STRONG_VIEW
    pairs = zip(images, generators, strict=True)
    return [plain.strong_view(image, settings, generator) for image, generator in pairs]


def losses(bench: Bench, rng: np.random.Generator, views=strong_views) -> dict[str, Tensor]:
    """All losses of a step, from its batches on; ``views`` makes the student's images."""
    with ours.plain_model(bench):
        if bench.stage == 1:
            return _distilled_losses(bench)
        selected = bench.labeling.select(ours.predictions(bench))
        labels = refine(bench, selected, rng)
        images = [sample["image"].to(bench.device) for sample in bench.unlabeled]
        images, labels = exchange(bench, images, labels)
        parts = zip(bench.unlabeled, views(bench, images), labels, strict=True)
        batch = [{**s, "image": image, "instances": its.to_instances()} for s, image, its in parts]
        weight = bench.cfg.S4M.UNSUP_LOSS_WEIGHT
        with bench.autocast():
            found = dict(bench.student(bench.labeled))
            for name, loss in bench.student(batch).items():
                found[f"unsup/{name}"] = weight * loss
        return found


def _distilled_losses(bench: Bench) -> dict[str, Tensor]:
    """Stage 1, with SAM and the distillation image by image."""
    loss = partial(plain.distillation, bench.distillation)
    one_by_one = OneByOne(bench.sam)
    with patch.object(bench.distillation, "backend", one_by_one), bench.autocast():
        with patch.object(bench.student, "distillation", loss):
            return bench.student(bench.labeled)


def training_step(bench: Bench) -> Callable[[], dict[str, float]]:
    """One step after another, as a plain loop: EMA, losses, backward, update."""
    rng = np.random.default_rng(0)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=bench.half)

    def step() -> dict[str, float]:
        if bench.teacher is not None:
            plain.update_teacher(bench.teacher.model, bench.student, bench.teacher.decay)
        found = losses(bench, rng)
        bench.optimizer.zero_grad()
        scaler.scale(sum(found.values())).backward()
        logged = {name: loss.item() for name, loss in found.items()}
        scaler.unscale_(bench.optimizer)
        scaler.step(bench.optimizer)
        scaler.update()
        return logged

    return step
