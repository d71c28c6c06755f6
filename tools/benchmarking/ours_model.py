"""The benchmark's calls into the student: its passes, its losses, its matching."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarking.bench import Bench
from s4m_d2.layers import ms_deform_attn
from s4m_d2.losses.matcher import ImageMatches
from s4m_d2.modeling.targets import prepare_targets
from s4m_d2.structures import sample_generators


class _Recorder(nn.Module):
    """Stands in for the criterion and keeps what it is given."""

    deep_supervision = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []

    def forward(self, outputs: dict, *_) -> dict:
        self.seen.append(outputs)
        return {}


@contextlib.contextmanager
def _recorded(bench: Bench) -> Iterator[list[dict]]:
    """What the student's forward in training hands to the criterion, instead of losses."""
    student, recorder = bench.student, _Recorder()
    criterion, distillation = student.criterion, student.distillation
    student.criterion, student.distillation = recorder, None
    try:
        with bench.autocast():
            yield recorder.seen
    finally:
        student.criterion, student.distillation = criterion, distillation


def student_outputs(bench: Bench, batches: Sequence[list[dict]]) -> list[dict]:
    """What the student predicts in training."""
    with _recorded(bench) as seen:
        for batch in batches:
            bench.student(batch)
    return seen


def targets(bench: Bench, batch: list[dict]) -> list[dict]:
    """The criterion's targets."""
    return prepare_targets(
        batch,
        padded_size=bench.size,
        num_classes=bench.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        device=bench.device,
    )


def losses(bench: Bench, outputs: Sequence[dict], wanted: Sequence, batches: Sequence) -> Tensor:
    """The sum of all losses but the distillation's."""
    weights = (1.0, bench.cfg.S4M.UNSUP_LOSS_WEIGHT)
    total = 0.0
    for output, target, batch, weight in zip(outputs, wanted, batches, weights, strict=False):
        generators = sample_generators(batch, "loss_points", bench.device)
        found = bench.student.criterion(output, target, generators)
        total = total + weight * sum(found.values())
    return total


def match(bench: Bench, output: dict, wanted: Sequence[dict], generators: Sequence | None) -> list:
    """For each image and layer (the last layer first) the matched queries and instances."""
    layers = [output, *output.get("aux_outputs", [])]
    matcher = bench.student.criterion.matcher
    return [
        [
            (torch.from_numpy(queries), torch.from_numpy(instances))
            for queries, instances in zip(image.queries, image.instances, strict=True)
        ]
        for image in matcher(layers, wanted, generators)
    ]


def as_matcher(plain: Callable) -> Callable:
    """A plain matcher in the place of the criterion's."""

    def match_all(layers: Sequence[dict], wanted: Sequence[dict], generators=None) -> list:
        matches = []
        for target, image in zip(wanted, plain(layers, wanted, generators), strict=True):
            queries, instances = (
                np.stack([side.cpu().numpy() for side in sides])
                for sides in zip(*image, strict=True)
            )
            labels = target["labels"].cpu().numpy()
            matches.append(ImageMatches(queries, instances, labels[instances], len(labels)))
        return matches

    return match_all


def deformable_sampling() -> Callable:
    """The look-up of deformable attention."""
    return ms_deform_attn.deformable_sampling


@dataclass(frozen=True)
class ModelForms:
    """Other ways to do what models and criterion do."""

    sampling: Callable
    matcher: Callable


@contextlib.contextmanager
def forms(bench: Bench, others: ModelForms | None) -> Iterator[None]:
    """Use other forms in all models and the criterion; None: the project's own."""
    if others is None:
        yield
        return
    criterion, sampling = bench.student.criterion, ms_deform_attn.deformable_sampling
    matcher = criterion.matcher
    ms_deform_attn.deformable_sampling = others.sampling
    criterion.matcher = as_matcher(others.matcher)
    try:
        yield
    finally:
        ms_deform_attn.deformable_sampling, criterion.matcher = sampling, matcher
